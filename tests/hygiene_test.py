"""Rules for the project's own source, checked on the source."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.every_case

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "anyexperts_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports go down this list only. Layers in one entry may not import one another, but for the pair named below.
LAYERS = [
    {"core"},
    {"ops"},
    {"routing"},
    {"sharding"},
    {"dispatch"},
    {"nn"},
    {"models"},
    {"tokenizers"},
    {"data"},
    {"pretrained"},
    {"train"},
    {"evolution"},
    {"evaluate"},
    {"serve"},
    {"harness"},
    {"report"},
    {"bench"},
    {"aot"},
    {"cli"},
]
LEVEL = {layer: level for level, layers in enumerate(LAYERS) for layer in layers}
FLAX_LAYERS = {"nn", "models"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def layer_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: pathlib.Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def in_package(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE], ids=in_package)
def test_imports_go_down_the_layers(path):
    layer = layer_of(path)
    assert layer in LEVEL, f"{layer} is no layer; add it to LAYERS at its height"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "anyexperts_jax" and len(parts) > 1 and parts[1] in LEVEL:
            other = parts[1]
            assert other == layer or LEVEL[other] < LEVEL[layer], f"{layer} imports {name}, which lies above it"


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_only_the_shells_import_flax(path):
    if layer_of(path) not in FLAX_LAYERS:
        assert not [n for n in imported_modules(path) if n.split(".")[0] == "flax"]


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_files_and_functions_stay_small(path):
    if "pallas" in path.name:
        pytest.skip("kernels are excepted")
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


DEFINED = {
    node.name
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.args.vararg is None)
}
MOST_POSITIONAL = 5
MANY_POSITIONAL = {  # kernels and their rules, called with the operands of one Pallas call or one VJP, in its order
    "ops/attention/vjp.py": "backward of the reference: saved operands and cotangent",
    "ops/expert_mlp/gpu_tile_table.py": "columns of a table's line",
    "ops/expert_mlp/mosaic_bodies.py": "Ref arguments of device code, which takes no keywords for them",
    "ops/expert_mlp/pallas_triton.py": "Ref arguments of device code",
    "ops/expert_mlp/tpu_bodies.py": "Ref arguments of device code",
    "ops/expert_mlp/tpu_grid.py": "what one copy into VMEM needs",
    "ops/expert_mlp/tpu_size_table.py": "columns of a table's line",
    "ops/expert_mlp/vjp_gpu.py": "operands of a kernel",
    "ops/expert_mlp/vjp_tpu.py": "operands of a kernel",
    "ops/routed_mlp/gpu.py": "operands of a kernel",
    "ops/routed_mlp/vjp.py": "backward of the XLA form: saved operands and cotangent",
}


def called_by_position(node: ast.Call) -> tuple[str, int]:
    """Returns the called name and its number of positional arguments; looks through `partial` too."""
    called, count = node.func, len(node.args)
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if name == "partial" and node.args:
        inner = node.args[0]
        return getattr(inner, "attr", getattr(inner, "id", "")), count - 1
    for argument in node.args:  # an unpacked tuple literal is counted by its items
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List):
            count += len(argument.value.elts) - 1
    return name, count


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_calls_name_their_arguments_past_the_fifth(path):
    excepted = str(path.relative_to(PACKAGE)) in MANY_POSITIONAL
    calls = [called_by_position(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    many = [(name, n) for name, n in calls if n > MOST_POSITIONAL and (name in DEFINED or name == "cls")]
    assert bool(many) == excepted, f"calls by position: {many}" if many else "needs no exception any more"


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_no_error_is_swallowed_and_no_global_state_is_set(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno} catches {caught}"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno}: ambient state {node.names}")
    assert "NotImplementedError()" not in text
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_tables_are_printed_by_the_function_that_keeps_figures_whole():
    """That function is `core.text_table.print_tables`; tests/printed_tables_test.py tries it on every table."""
    drawing = {in_package(path) for path in SOURCES if "rich.table" in imported_modules(path)}
    assert drawing == {"anyexperts_jax/core/text_table.py", "anyexperts_jax/data/show.py"}


def test_counts_and_sizes_are_printed_in_a_unit_that_fits_them():
    """A fixed unit makes a tiny model "0.0M parameters, 0.00 GB"; core.quantities chooses the unit."""
    fixed = re.compile(r"/ (1e(6|9|12)|2\*\*[123]0):")
    found = [
        str(path.relative_to(ROOT)) for path in SOURCES if path.stem != "quantities" and fixed.search(path.read_text())
    ]
    assert not found


def test_our_own_deprecated_calls_fail_a_test():
    """Tests the filter in pyproject.toml, which ignores deprecated calls made by other packages."""
    call = "import warnings\ndef old(): warnings.warn('old', DeprecationWarning, stacklevel=2)\nold()"
    exec(call, {"__name__": "some_package"})
    with pytest.raises(DeprecationWarning):
        exec(call, {"__name__": "anyexperts_jax.train.loop"})


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tracked_text_files() -> list[pathlib.Path]:
    paths = [ROOT / name for name in run("git", "ls-files").splitlines()]
    return [path for path in paths if path.suffix not in (".png", ".wav") and path.exists()]


def test_no_file_names_a_package_registry():
    hosts = "|".join(["pypi" + r"\.org", "python" + "hosted", "npm" + "js"])  # split: this file is searched too
    for path in tracked_text_files():
        assert not re.search(hosts, path.read_text(errors="ignore")), path


def headings(page: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_our_pages_resolves():
    for page in [path for path in tracked_text_files() if path.suffix == ".md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            target, _, heading = link.partition("#")
            if "://" in link:
                continue
            other = page.parent / target if target else page
            assert other.exists(), f"{in_package(page)} links to {link}"
            assert not heading or heading in headings(other), f"{in_package(page)}: no heading for {link}"


CONFIGS = sorted(
    path
    for folder in ("anyexperts_jax/train/configs", "anyexperts_jax/evolution/configs", "experiments")
    for path in (ROOT / folder).rglob("*.toml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=in_package)
def test_a_configs_header_states_how_to_run_it_and_what_to_expect(path):
    header = path.read_text().partition("\n\n")[0]
    if "Not an experiment of its own" in header:
        return
    assert "#   anyexperts " in header or "#   python -m experiments.reproduce " in header
    assert any(said in header for said in ("Expected: ", "No score was measured", "not run yet")), "what is expected?"


def test_the_public_names_resolve():
    package = importlib.import_module("anyexperts_jax")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("statement", ["import anyexperts_jax", "from anyexperts_jax import route, moe_apply"])
def test_import_is_light_and_under_two_seconds(statement):
    code = (
        f"import sys, time; {statement}; took = time.process_time();"
        "heavy = {'flax', 'matplotlib', 'sklearn', 'grain', 'orbax'} & set(sys.modules); print(took, *heavy)"
    )
    runs = [run(sys.executable, "-c", code).split() for _ in range(3)]
    assert all(len(words) == 1 for words in runs), f"heavy modules imported: {runs}"
    assert min(float(words[0]) for words in runs) < 2.0, "processor time, so that a busy machine does not count"


def test_no_two_test_files_are_the_same_module():
    """pytest names a module by its path below the nearest folder that is no package, and refuses a name taken twice."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*_test.py")):
        top = next(folder for folder in path.parents if not (folder / "__init__.py").is_file())
        found.setdefault(str(path.relative_to(top)), []).append(str(path.relative_to(ROOT)))
    assert not [same for same in found.values() if len(same) > 1]
