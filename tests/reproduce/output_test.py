"""Tables, pages and pictures from canned results."""

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

from anyexperts_jax.core.errors import UserError
from experiments.reproduce import papers
from experiments.reproduce.claims import all_claims, signed
from experiments.reproduce.collect import Results, load_kept, save_kept
from experiments.reproduce.layer_times import LayerTimes, load_layer_times, save_layer_times
from experiments.reproduce.output import OLD_SPLITS_NOTE, QUICK_NOTE, Page, old_splits, write_page
from experiments.reproduce.readme import BEGIN, END, update_readme
from experiments.reproduce.run_result import load_result, save_result
from experiments.reproduce.statistics import Summary, summarise
from experiments.reproduce.tables import ablation_table, budget_table, separation_table, verdict_table, wer_table
from reproduce.canned import SEEDS, figure3, table3

TIMES = LayerTimes("S1", 4096, "cpu", {}, 0.0, ((4.0, 20.0), (10.0, 44.0)), ((4.0, 20.0), (8.0, 40.0), (10.0, 50.0)))


@pytest.fixture(scope="module")
def page():
    budgets = figure3(gain=0.04, auc=0.7)
    names = ("figure3", "table1", "table2", "figure5")
    return Page(
        {**dict.fromkeys(names, budgets), "table3": table3(hsm=0.05)},
        "python -m experiments.reproduce all",
        282_491,
        times=TIMES,
    )


@pytest.fixture(scope="module")
def written(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page(page, folder)
    return folder


def test_the_papers_figures_are_read():
    assert papers.audio_wer()["dynamic", 4.8] == 2.99
    assert papers.audio_wer()["static", 10.0] == 2.78
    assert papers.budget_scores()["nlp", "GPQA"] == {8.0: 41.92, 7.2: 38.87}
    assert papers.ablation_scores()["nlp", "ARC-C"]["beta_max_0.25"] == 48.14
    assert papers.ablation_scores()["speech", "Average"]["ours"] == 2.82


def test_table_1_has_the_papers_rates_where_it_gives_them():
    rows = {row[:2]: row for row in wer_table(figure3(seeds=(0, 1))).rows}
    assert rows["dynamic, one checkpoint", "4.8"][4:] == ("2", "2.99")
    assert rows["static, retrained", "10.0"][5] == "2.78"
    static = figure3(seeds=(0, 1)).found
    rates = [100 * static["static 4", seed].own.score("speech").wer for seed in (0, 1)]
    assert rows["static, retrained", "4.0"][3] == f"{np.mean(rates):.1f} ± {np.std(rates, ddof=1):.1f}"


def test_table_2_has_differences_by_question_type():
    lost = figure3(loss_at=lambda name, budget: -0.1 * (budget == 7.2) * (name == "ocr"))
    rows = {row[0]: row for row in budget_table(lost).rows}
    assert rows["dynamic 8.0: ocr"][3].startswith("-10.")
    assert rows["dynamic 8.0: ocr, which"][3] == rows["dynamic 8.0: ocr"][3]
    assert rows["dynamic 8.0: ocr"][4:] == ("80.52", "80.24")


def test_table_3_is_paired_by_seed():
    rows = {row[0]: row for row in ablation_table(table3(hsm=0.05, spread=0.002)).rows}
    found = rows["without HSM"]
    mean, low, high = found[8].replace("(", "").replace(")", "").replace("to ", "").split(" ")
    assert float(mean) == -5.0
    assert -5.4 < float(low) < float(high) < -4.6, "the spread between seeds, ten times as wide, cancels"
    assert found[9] == str(len(SEEDS))
    assert found[10] == "53.16 / 69.38 / 68.78 / 2.81 / 44.63"
    assert rows["dynamic 8.0"][8] == "-"


def test_separations_are_means_over_seeds():
    rows = separation_table(figure3(auc=0.7)).rows
    assert [row[:2] for row in rows] == [("dynamic 8.0", "text"), ("dynamic 8.0", "video")]
    assert rows[0][2].startswith("0.70 (0.70 to 0.70")
    assert rows[0][5:] == ("0.75", "0.50", "5")


def test_points_are_shown_with_signs():
    assert signed(Summary(5, -0.0123, 0.1, -0.02, 0.005)) == "-1.2 (-2.0 to +0.5)"
    assert signed(summarise([])) == "-"


def test_a_verdict_on_auc_names_its_unit():
    cells = {row[0]: row[2] for row in verdict_table(all_claims(figure3(auc=0.7), Results({}))).rows}
    assert cells.pop("Importance follows meaning: the paper's terms") == "+20.1 (+20.0 to +20.1) of AUC above 50"
    assert not [cell for cell in cells.values() if "AUC" in cell]


@pytest.mark.slow
def test_the_page_shows_maps_drawn_before(page, tmp_path):
    (tmp_path / "figure4_salience_ocr.png").touch()
    write_page(page, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "![figure4_salience_ocr.png](figure4_salience_ocr.png)" in text
    assert text.count("![figure5_auc.png]") == 1


@pytest.mark.slow
def test_the_page_holds_tables_and_pictures(written):
    text = (written / "README.md").read_text()
    for part in (
        "## Verdicts",
        "Table 1",
        "Table 2",
        "Table 3",
        "figure3.png",
        "supported",
        "their direction",
        "of 0.3M parameters",
    ):
        assert part in text
    assert QUICK_NOTE not in text
    rows = list(csv.DictReader((written / "verdicts.csv").read_text().splitlines()))
    verdicts = {row["claim"]: row["verdict"] for row in rows}
    assert verdicts["Dynamic beats static at equal real experts: one checkpoint"] == "supported"
    for name in ("figure3.png", "figure3_realised.png", "figure5_auc.png"):
        with Image.open(written / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_a_quick_page_says_so_everywhere(page, tmp_path):
    write_page(Page({"table3": page.results["table3"]}, "--quick", 282_491, quick=True), tmp_path)
    assert QUICK_NOTE in (tmp_path / "README.md").read_text()
    for path in tmp_path.glob("*.csv"):
        assert path.read_text().startswith(f"# {QUICK_NOTE}")


def test_missing_runs_are_named(tmp_path):
    whole = table3(hsm=0.05)
    part = Results({k: v for k, v in whole.found.items() if k != ("without HSM", 4)}, (("without HSM", 4),))
    write_page(Page({"table3": part}, "x", 140_000_000), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "left out of what follows: without HSM (seeds 4)." in text
    assert "of 140M parameters" in text


def test_only_runs_of_the_same_start_are_paired(tmp_path):
    """Two trainings of one start differ by chance, as two seeds do; a start of another name differs on purpose."""
    origins = {("without HSM", 2): "start_1:b", ("dynamic 8.0", 3): None, ("without HSM", 4): "start_2:b"}
    found = table3(hsm=0.05).found
    results = Results(
        {key: dataclasses.replace(one, origin=origins.get(key, "start_1:a")) for key, one in found.items()}
    )
    assert results.seeds("dynamic 8.0", "without HSM") == [0, 1, 3, 4]
    assert results.seeds("without HSM") == [0, 1, 2, 3, 4]
    assert len(results.paired(["dynamic 8.0", "without HSM"], lambda a, b: 0.0)) == 4
    assert results.apart == [2]
    write_page(Page({"table3": results}, "x", 140_000_000), tmp_path)
    assert (
        "Runs of seeds 2 went on from starts that were trained more than once" in (tmp_path / "README.md").read_text()
    )


def test_runs_of_old_splits_are_mentioned_at_the_top(page, tmp_path):
    results = table3(hsm=0.05)
    old = {key: dataclasses.replace(one, splits=None) for key, one in results.found.items() if key[1] == 3}
    mixed = Page({"table3": Results(dict(results.found) | old)}, "x", 282_491)
    write_page(mixed, tmp_path)
    note = OLD_SPLITS_NOTE.format(len(old), len(results.found))
    assert (tmp_path / "README.md").read_text().splitlines()[2] == note
    readme = tmp_path / "readme.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    update_readme(mixed, tmp_path, readme)
    assert readme.read_text().splitlines()[1] == note
    assert not old_splits({"table3": results})
    assert load_kept(save_kept({"a": old["without HSM", 3]}, tmp_path).parent)["without HSM-3"].splits is None


def test_results_survive_the_disk(tmp_path):
    one = table3().found["dynamic 8.0", 0]
    back = load_result(save_result(one, tmp_path))
    assert (back.id, back.separations[0].modality) == (one.id, "text")
    assert back.own.score("speech").wer == pytest.approx(one.own.score("speech").wer, rel=1e-5)
    save_kept({one.id: back}, tmp_path)
    assert load_kept(tmp_path) == {one.id: back}
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"runs\.jsonl, line 1 is not a run's result"):
        load_kept(tmp_path)
    assert load_layer_times(tmp_path) is None
    save_layer_times(TIMES, tmp_path)
    assert load_layer_times(tmp_path) == TIMES


def test_readme_is_rewritten_between_its_markers(page, written, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(page, written, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| Hidden-state modulation helps | supported |" in text
    update_readme(page, written, readme)
    assert readme.read_text() == text
    readme.write_text("nothing")
    with pytest.raises(UserError, match="must hold"):
        update_readme(page, written, readme)
