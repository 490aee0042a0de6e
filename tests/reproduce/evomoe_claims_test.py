"""EvoMoE's claims, tables and page on invented results that support, contradict or do not decide them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from experiments.reproduce import papers
from experiments.reproduce.collect import Results
from experiments.reproduce.evomoe_claims import BOTH, apart, evomoe_findings, overlap, shuffle_cost
from experiments.reproduce.evomoe_output import write_evomoe_page
from experiments.reproduce.evomoe_tables import expert_table, finding_table, variant_table
from experiments.reproduce.output import Page
from experiments.reproduce.readme import EVOMOE_BEGIN, EVOMOE_END, update_readme
from experiments.reproduce.reproduce import default_out, whole_page
from experiments.reproduce.run_result import ExpertFigures, result_from_json, result_to_json
from reproduce.canned import SEEDS, at_budget, noise, run_result

ROUTERS = ("linear", "per modality", "per modality, shared", "DTR", "DTR, shared")
PLAIN = ("dense", "expert 1 alone")
SHUFFLED, RIGID = "Shuffling costs where experts evolved", "Router rigidity: logits of image and text overlap more"


def experts(cost=0.0, overlap=0.5, distance=0.0, stages=("evolving", "routing")):
    return ExpertFigures(
        loss=0.4,
        shuffled_loss=0.4 + cost,
        alone=(0.4, 0.41),
        distance=dict.fromkeys(stages, (distance, distance)),
        drift=dict.fromkeys(stages, 0.1),
        overlap={"text-image": overlap},
        share={"text": (0.5, 0.5)},
    )


def results(scores, figures=None, seeds=SEEDS, spread=0.001):
    """Results of variants: scores relative to the seed's own, give or take `spread`, and figures of their experts."""
    found = {}
    for name, score in scores.items():
        for place, seed in enumerate(seeds):
            own = 0.5 + noise(seed) + score + spread * (place - 2) * (1 if "DTR" in name else -1)
            one = run_result(name, seed, [at_budget(1.0, own)], 1.0)
            known = None if name in PLAIN else (figures or {}).get(name, experts())
            found[name, seed] = dataclasses.replace(one, experts=known)
    return Results(found)


def verdicts_of(found):
    return {one.claim.statement: one.claim.verdict for one in evomoe_findings(found)}


@pytest.mark.parametrize(
    ("gain", "spread", "verdict"),
    [(0.05, 0.001, "supported"), (-0.02, 0.001, "not supported"), (0.005, 0.02, "undecided at this scale")],
)
def test_a_gain_has_each_verdict(gain, spread, verdict):
    found = verdicts_of(results({BOTH: gain, "MoE-tuning": 0.0, "evolution + linear": 0.0}, spread=spread))
    assert found["Evolution and DTR beat MoE-tuning"] == verdict
    assert found["DTR beats a linear router: evolved experts"] == verdict
    assert "Evolution and DTR beat the dense model" not in found, "without runs there is no verdict"


def test_every_table_has_its_claims():
    names = [f"{kind} + {router}" for kind in ("evolution", "snapshots") for router in ROUTERS]
    names += ["dense", "expert 1 alone", "MoE-tuning", "MoE-tuning + DTR", "MoE-tuning, top-2", "literal"]
    names += ["noise", "dropout", "contrastive", "local entropy", "evolving in stage I", "cosine to zero"]
    names += ["beta 0", "beta 0.5", "beta 0.9", "beta 0.99", "dynamic 8.0", "dynamic 8.0, DTR"]
    names += ["snapshots + DTR, 2 experts", "snapshots + DTR, 8 experts"]
    findings = evomoe_findings(results(dict.fromkeys(names, 0.0)))
    statements = [one.claim.statement for one in findings]
    assert len(set(statements)) == len(statements) == 51
    known = {one.claim.statement: one.paper for one in findings}
    assert known["Evolution and DTR beat MoE-tuning"] == "66.5 / 65.5"
    assert known["DTR beats a linear router for each modality"] == "65.2 / 64.7"
    assert known["Evolution beats: local entropy"] == "65.2 / 64.3"
    assert known["Evolution beats: noise (snapshots, ours)"] == ""


def test_beta_zero_is_compared_with_expert_one():
    statement = "Beta 0 leaves expert 1 (the paper: to the digit)"
    assert verdicts_of(results({"beta 0": 0.0, "expert 1 alone": 0.0}))[statement] == "supported"
    assert verdicts_of(results({"beta 0": 0.1, "expert 1 alone": 0.0}))[statement] == "not supported"
    assert verdicts_of(results({"beta 0": -0.1, "expert 1 alone": 0.0}))[statement] == "not supported"


@pytest.mark.parametrize(
    ("cost", "uniform", "shuffled"), [(-0.001, "supported", "not supported"), (0.05, "not supported", "supported")]
)
def test_uniformity_is_judged_by_the_cost_of_shuffling(cost, uniform, shuffled):
    figures = dict.fromkeys(("MoE-tuning", BOTH), experts(cost=cost))
    found = verdicts_of(results({"MoE-tuning": 0.0, BOTH: 0.0}, figures))
    assert found["Expert uniformity: shuffling costs nothing after MoE-tuning from copies, linear router"] == uniform
    assert found[SHUFFLED] == shuffled


@pytest.mark.parametrize(("linear", "verdict"), [(0.8, "supported"), (0.5, "not supported")])
def test_rigidity_is_judged_by_overlap(linear, verdict):
    figures = {"evolution + linear": experts(overlap=linear), BOTH: experts(overlap=0.5)}
    found = verdicts_of(results({"evolution + linear": 0.0, BOTH: 0.0}, figures))
    assert found[f"{RIGID} with a linear router"] == verdict


@pytest.mark.parametrize(("distance", "verdict"), [(0.05, "supported"), (1e-6, "not supported")])
def test_evolved_experts_end_apart_or_alike(distance, verdict):
    found = verdicts_of(results({"cosine to zero": 0.0}, {"cosine to zero": experts(distance=distance)}))
    assert found["Evolved experts end apart: a cosine to zero, the paper's"] == verdict


def test_a_verdict_is_shown_in_the_unit_of_its_figure():
    """A cost of 0.05 nats is not shown as 5 points, and a distance of half of the drift is not shown as 40%."""
    figures = {
        "MoE-tuning": experts(cost=0.05),
        "snapshots + linear": experts(overlap=0.62),
        "snapshots + DTR": experts(overlap=0.5, distance=0.05),
        "cosine to zero": experts(distance=1e-4),
    }
    table = finding_table(evomoe_findings(results(dict.fromkeys(figures, 0.0), figures)))
    assert table.columns[2] == "difference in points, or as told (95%)"
    cells = {row[0]: row[2] for row in table.rows}
    uniform = "Expert uniformity: shuffling costs nothing after MoE-tuning from copies, linear router"
    assert cells[uniform] == "-0.050 (-0.050 to -0.050) nats"
    rigid = f"{RIGID} with a linear router (snapshots, ours)"
    assert cells[rigid] == "+0.120 (+0.120 to +0.120) of overlap"
    assert cells["Evolved experts end apart: snapshots (ours)"] == (
        "50.0% (50.0% to 50.0%) of expert 1's drift (above 10% is apart)"
    )
    assert cells["Evolved experts end apart: a cosine to zero, the paper's"].startswith("0.1% (0.1% to 0.1%) of")


def test_unmeasured_figures_are_undefined():
    dense = results({"dense": 0.0}).found["dense", 0]
    copies = dataclasses.replace(dense, experts=experts(stages=("routing",)))
    for one in (dense, copies):
        assert np.isnan(apart(one))
    assert np.isnan(shuffle_cost(dense))
    assert np.isnan(overlap(copies, "text-video"))


def test_the_papers_figures_are_shown():
    scores = papers.evomoe_scores()
    assert (scores["moe_tuning"], scores["evolution_dtr"]) == (65.5, 66.5)
    assert scores["dtr"] == pytest.approx((61.2 + 63.3 + 49.2 + 87.1) / 4)
    assert len(scores) == 16


def test_tables_pair_by_seed_and_work_with_part_of_the_runs():
    found = results({"MoE-tuning": 0.0, BOTH: 0.04}, {BOTH: experts(cost=0.01, distance=0.02)})
    part = Results({key: one for key, one in found.found.items() if key != (BOTH, 4)}, ((BOTH, 4),))
    rows = {row[0]: row for row in variant_table("evomoe-components", part).rows}
    assert rows[BOTH][7].startswith("+3.9"), "seeds 0 to 3 alone"
    assert rows[BOTH][8:] == ("4", "66.5")
    assert rows["MoE-tuning"][7] == "-"
    (row,) = [row for row in expert_table(part).rows if row[0] == BOTH]
    assert row[2].startswith("+0.0100")
    assert row[5].startswith("2.0e-01")


def test_routers_are_compared_with_the_linear_one_of_the_same_experts():
    names = ("evolution + linear", "evolution + DTR", "snapshots + linear", "snapshots + DTR")
    rows = {
        row[0]: row
        for row in variant_table("evomoe-routers", results(dict(zip(names, (0, 0.02, 0.1, 0.1), strict=True)))).rows
    }
    assert rows["evolution + DTR"][7].startswith("+2.")
    assert abs(float(rows["snapshots + DTR"][7].split(" ")[0])) < 0.5
    assert rows["evolution + DTR"][9] == "65.2"


def test_the_page_and_the_readme_block(tmp_path):
    shown = {
        "evomoe-components": results({"dense": 0.0, "MoE-tuning": 0.0, BOTH: 0.04}),
        "evomoe-beta": Results({}, (("literal", 0),)),
    }
    page = Page(shown, "python -m experiments.reproduce evomoe", 400_000)
    write_evomoe_page(page, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "## Verdicts",
        "Components",
        "scores.png",
        "experts.png",
        "literal (seeds 0)",
        "their direction",
        "of 0.4M",
    ):
        assert part in text
    rows = list(csv.DictReader((tmp_path / "out" / "verdicts.csv").read_text().splitlines()))
    assert {row["claim"]: row["paper, %"] for row in rows}["Evolution and DTR beat the dense model"] == "66.5 / 65.4"
    for name in ("scores.png", "experts.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{EVOMOE_BEGIN}\nold\n{EVOMOE_END}\nafter\n")
    update_readme(page, tmp_path / "out", readme)
    assert "| Evolution and DTR beat MoE-tuning | supported |" in readme.read_text()
    assert "out/README.md" in readme.read_text()


def test_each_paper_has_its_page():
    assert whole_page(["evomoe-beta", "evomoe-routers"]) == ("evomoe",)
    assert whole_page(["table1"]) == ("all",)
    assert whole_page(["mine.toml"]) == ["mine.toml"]
    assert default_out(["evomoe"]).name == "evomoe"
    assert default_out(["all"]) == default_out(["mine.toml"]) == default_out(["evomoe"]).parent
    assert default_out(["all"], "small") == default_out(["all"]) / "small"


def test_experts_figures_survive_the_disk():
    one = dataclasses.replace(results({BOTH: 0.0}).found[BOTH, 0], experts=experts(cost=0.01, overlap=float("nan")))
    back = result_from_json(json.dumps(result_to_json(one)), "x")
    assert back.experts.distance == one.experts.distance
    assert np.isnan(back.experts.overlap["text-image"])
    without = result_to_json(one)
    del without["experts"]
    assert result_from_json(json.dumps(without), "x").experts is None, "an older result without them"
