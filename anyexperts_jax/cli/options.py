"""Parsers and options that several commands use."""

import argparse
import json
import math
import pathlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from anyexperts_jax.core.checks import INT32
from anyexperts_jax.core.errors import UserError, one_line

if TYPE_CHECKING:
    from jax.sharding import Mesh


class Parser(argparse.ArgumentParser):
    """Reports an invalid command in one line, and shows the default of every option in its help."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of examples, and appends defaults to the help of options that have one and are not off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_none = action.default is None or action.default is False or action.default == []
        says_itself = has_none or "(default" in text
        return text if says_itself else super()._get_help_string(action)


def add_command(
    commands: "argparse._SubParsersAction[Any]", name: str, text: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Adds the parser of a command, whose help begins with `text` and ends with examples of the whole command."""
    lines = "\n".join(f"  {example}" for example in examples)
    description = textwrap.fill(f"{text[0].upper()}{text[1:]}.", 78)
    return commands.add_parser(name, help=text, description=description, epilog=f"examples:\n{lines}")


def whole(least: int, below: int = INT32.stop) -> Callable[[str], int]:
    """Returns the type of an option that takes a whole number >= `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number") from error
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be >= {least}")
        if value >= below:
            raise argparse.ArgumentTypeError(f"{value} must be below 2^{int(math.log2(below))}")
        return value

    return parse


positive = whole(1)
natural = whole(0)
seed = whole(0, 2**32)


def positive_number(text: str) -> float:
    """Parses an option that takes a finite number > 0."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from error
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be finite and > 0")
    return value


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """Returns the type of an option that takes a finite number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number") from error
        if not (least <= value <= most and math.isfinite(value)):
            upper = "" if math.isinf(most) else f" and <= {most:g}"
            raise argparse.ArgumentTypeError(f"{text} must be finite, >= {least:g}{upper}")
        return value

    return parse


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=pathlib.Path, help="a folder with config.json and safetensors, or a GGUF file")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=pathlib.Path, help="a run's directory, a published checkpoint's folder, or a GGUF file"
    )


def add_adapters(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --adapter NAME=FOLDER, whose value `adapters_of` reads."""
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help=text)


def adapters_of(options: argparse.Namespace) -> dict[str, pathlib.Path]:
    """The folders of --adapter by name.

    Raises:
      UserError: for a value that is not NAME=FOLDER, or a name that is given twice.
    """
    from anyexperts_jax.data.config import named_places

    return {name: pathlib.Path(place) for name, place in named_places(options.adapter, "--adapter").items()}


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (tiny, small, smoke), a TOML file, a run, or a published checkpoint")
    add_set(parser, "override, as in optim.lr=1e-3; repeatable; `anyexperts config CONFIG` lists all keys")
    add_plugin(parser)


def add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="your own module that registers routers, dispatchers and so on; imported first and recorded; repeatable",
    )


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_data(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help=text)


def data_overrides(
    source: str, entries: Sequence[str], plugins: Sequence[str] = (), *, evolves: bool = False
) -> list[str]:
    """Turns --data NAME=PATH into overrides of a configuration.

    A configuration with only the generated domains then reads only these names; any other reads them beside its own.

    Args:
      evolves: whether it is the configuration of an EvoMoE run.

    Raises:
      UserError: if an entry has another form, or the configuration cannot be read.
    """
    from anyexperts_jax.data.config import named_places
    from anyexperts_jax.data.domain import DOMAIN_NAMES
    from anyexperts_jax.evolution.config import load_evolve_config
    from anyexperts_jax.train.config import load_config

    given = named_places(entries, "--data")
    if not given:
        return []
    data = load_evolve_config(source).base.data if evolves else load_config(source, (), plugins).data
    alone = data.domains == DOMAIN_NAMES and not data.folders
    domains = list(given) if alone else list(dict.fromkeys([*data.domains, *given]))
    folders = [f"{name}={place}" for name, place in {**data.places(), **given}.items()]
    changed = [f"data.domains={json.dumps(domains)}", f"data.folders={json.dumps(folders)}"]
    return [*changed, "data.weights=none"] if alone and data.weights is not None else changed


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        nargs="+",
        metavar="AXIS=SIZE",
        help="mesh to put the model on, as fsdp=4 expert=2, whatever it was trained on (default: the first device)",
    )


def mesh_of(options: argparse.Namespace) -> "Mesh | None":
    """Returns the mesh that --mesh asks for; None without the option.

    Raises:
      UserError: for an unknown axis, a size that is not a number, or sizes that do not fit the devices.
    """
    if options.mesh is None:
        return None
    from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
    from anyexperts_jax.train.config_files import parse_override
    from anyexperts_jax.train.strict import build, merge

    sizes: dict[str, Any] = {}
    for text in options.mesh:
        sizes = merge(sizes, parse_override(text))
    try:
        return make_mesh(build(MeshConfig, sizes))
    except UserError as error:
        raise UserError(f"--mesh {' '.join(options.mesh)}: {error}") from error


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    add_mesh(parser)
    parser.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="the checkpoint with the lowest validation loss, or the latest",
    )
