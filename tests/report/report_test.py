"""The report of a run with and without an evaluation, a checkpoint and importance."""

import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from evaluate.results_made_up import evaluation, summary
from evaluate.stand_in import DATA, MODEL, config_of, trained, write_records, write_run
from PIL import Image

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.results import save_evaluation
from anyexperts_jax.evaluate.trained import load_trained
from anyexperts_jax.models.presets import static_twin
from anyexperts_jax.report import charts, followed, source, style
from anyexperts_jax.report.budget_curves import draw_budget_curves
from anyexperts_jax.report.page import report
from anyexperts_jax.report.tables import print_evaluation
from anyexperts_jax.train.run_dir import RunDir, open_run_dir
from anyexperts_jax.train.run_log import RunLog, read_records

NAN = float("nan")


class Page(html.parser.HTMLParser):
    """What a page shows and where it would fetch from."""

    def __init__(self, path):
        super().__init__()
        self.text, self.sources, self.open_tags = "", [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        prefix = "data:image/png;base64,"
        found = [source.removeprefix(prefix) for source in self.sources if source.startswith(prefix)]
        return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def check_self_contained(path) -> Page:
    page = Page(path)
    assert page.open_tags == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    assert 'name="viewport"' in path.read_text()
    assert "prefers-color-scheme: dark" in path.read_text()
    sizes = {picture.size for picture in page.pictures()}
    assert sizes == {size_of(file) for file in path.parent.glob("*.png")}
    assert all(width == round(8 * style.DPI) for width, _ in sizes)
    return page


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Uses the batch sizes of the evaluation's tests, so that their compiled programs are reused; answers are tested
    there."""
    monkeypatch.setattr(source, "ROUTING_EXAMPLES", 6)
    monkeypatch.setattr(followed, "predict", lambda one, model, batch, *_: ["7"] * len(batch.tokens_BT))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "whole", trained())


@pytest.mark.slow
def test_a_whole_run_is_reported_in_full(run):
    save_evaluation(evaluation(), run)
    page = check_self_contained(report(run, examples=2))
    assert "Not evaluated" not in page.text
    assert "No maps" not in page.text
    names = {path.stem for path in (run / "report").glob("*.png")}
    maps = {"importance_general", "importance_nlp"}
    assert names == {"budget_curves", "load", "real_experts", "separation", "training"} | maps
    assert len(page.pictures()) == len(names)
    for text in ("2.42 (+1.0%)", "0.710 (0.680 to 0.740)", "7 of 8 are met", "anyexperts evaluate", "budget 3.6"):
        assert text in page.text


@pytest.mark.slow
def test_a_run_without_evaluation_is_measured_and_says_what_is_missing(run):
    (run / "evaluation.json").unlink(missing_ok=True)
    page = check_self_contained(report(run, examples=2))
    assert page.text.count(f"run `anyexperts evaluate {run}`") == 2
    assert "6 test examples of each domain" in page.text
    assert {"load.png", "real_experts.png", "separation.png"} <= {path.name for path in (run / "report").iterdir()}
    assert not (run / "report" / "budget_curves.png").exists()  # from the previous report


@pytest.mark.slow
def test_the_loaded_checkpoint_is_the_one_written(run):
    loaded, one = load_trained(run), trained()
    assert loaded.step == 4
    assert loaded.config == one.config
    name = "moe_layers"
    np.testing.assert_array_equal(
        loaded.params["decoder"][name]["moe"]["router"]["kernel"],
        one.params["decoder"][name]["moe"]["router"]["kernel"],
    )


def test_a_run_that_just_began_has_a_page(tmp_path):
    open_run_dir(tmp_path, config_of(MODEL))
    page = check_self_contained(report(tmp_path))
    assert page.pictures() == []
    for text in ("Not evaluated yet", "No maps: no run in", "Not measured", "No records"):
        assert text in page.text


@pytest.mark.slow
def test_static_top_k_has_no_importance_to_show(tmp_path):
    open_run_dir(tmp_path, config_of(static_twin(MODEL, 4)))
    write_records(RunDir(tmp_path))
    plain = dataclasses.replace(evaluation(), separations=(), trained=dataclasses.replace(summary(), importance_LM=()))
    save_evaluation(plain, tmp_path)
    page = check_self_contained(report(tmp_path))
    assert page.text.count("there is no importance to show") == 2
    assert "static top-4" in page.text


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        report(tmp_path / "nothing")
    with pytest.raises(UserError, match="examples=0"):
        report(tmp_path, examples=0)


def test_text_from_a_run_is_escaped(tmp_path):
    root = tmp_path / "a<b>&c"
    open_run_dir(root, config_of(MODEL))
    path = report(root)
    assert "a<b>" not in path.read_text()
    assert "a<b>&c" in Page(path).text


@pytest.mark.parametrize("name", ["[/red]", "[b]x", ":cat:", "<b>&", "$x$ \\frac", "_own", "a|b", "日本"])
def test_names_of_domains_are_shown_verbatim(name, tmp_path, capsys):
    """On the terminal, on the page and in pictures, each of which has its own markup."""
    found = evaluation(name, "nlp")
    print_evaluation(found)
    assert capsys.readouterr().out.count(name) >= 2
    open_run_dir(tmp_path, config_of(MODEL))
    save_evaluation(found, tmp_path)
    page = check_self_contained(report(tmp_path))
    assert page.text.count(name) >= 3
    log = RunLog(RunDir(tmp_path), 0)
    log.write("validation", 4, {"loss": 0.5, "domains": {name: {"loss": 0.5, "exact_match": 0.25}}})
    log.close()
    records = [{"kind": "train", "step": 4, "answer_loss": 1.0}, *read_records(RunDir(tmp_path).metrics)]
    with style.figure(2, 2, tmp_path / "domains.png") as drawn:
        axes = drawn.subplots()
        charts._draw_domains(axes, records[1:])
        assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == [name]


def test_training_charts_handle_modalities_that_come_and_go(tmp_path):
    open_run_dir(tmp_path, config_of(MODEL))
    write_records(RunDir(tmp_path), steps=90)
    path = charts.draw_training(read_records(RunDir(tmp_path).metrics), tmp_path / "training.png")
    assert size_of(path)[0] == round(8 * style.DPI)


def test_the_routers_losses_are_drawn_where_the_run_has_them(tmp_path):
    open_run_dir(tmp_path, config_of(MODEL))
    write_records(RunDir(tmp_path), steps=9)
    records = read_records(RunDir(tmp_path).metrics)
    train = [record for record in records if record["kind"] == "train"]
    assert charts.router_losses(train) == {
        "balance_loss": pytest.approx([1 + 0.2 / step for step in range(1, 10)]),
        "z_loss": pytest.approx([9 + step % 3 for step in range(1, 10)]),
    }, "an importance loss that is 0 throughout has no panel"
    plain = [{key: value for key, value in one.items() if key not in charts.ROUTER_LOSSES} for one in records]
    assert charts.router_losses(plain) == {}
    small, whole = (
        charts.draw_training(which, tmp_path / "training.png") and size_of(tmp_path / "training.png")
        for which in (plain, records)
    )
    assert small[0] == whole[0]
    assert small[1] < whole[1]


def test_a_dense_run_has_a_chart_without_experts(tmp_path):
    open_run_dir(tmp_path, config_of(MODEL))
    write_records(RunDir(tmp_path), steps=9)
    records = [one | {"real_slots": []} for one in read_records(RunDir(tmp_path).metrics)]
    assert charts.draw_training(records, tmp_path / "training.png").stat().st_size > 5000


def test_smoothing_is_a_centred_mean_that_skips_gaps():
    values = [0.0] * 40 + [NAN] + [4.0] * 39  # 80 records: two to either side
    smooth = charts._smooth(values)
    assert smooth[20] == 0
    assert smooth[40] == pytest.approx(2.0)  # 0, 0, -, 4, 4
    assert smooth[41] == pytest.approx(3.0)  # 0, -, 4, 4, 4
    assert np.isnan(charts._smooth([NAN, NAN])).all()


def test_curves_of_one_budget_are_drawn(tmp_path):
    one = dataclasses.replace(evaluation(), budgets=evaluation().budgets[:1])
    assert draw_budget_curves(one, tmp_path / "curve.png").stat().st_size > 5000
    assert DATA.domains == ("general", "nlp")
