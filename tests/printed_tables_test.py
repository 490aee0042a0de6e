"""Prints every table of every command with its longest figures on a terminal of 80 columns."""

import io

import pytest
from evaluate.results_made_up import evaluation
from rich.console import Console

from anyexperts_jax.aot import search, step_tables
from anyexperts_jax.aot.bounds import Bounds
from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.step import CompiledStep
from anyexperts_jax.aot.work import Work
from anyexperts_jax.bench.layer import BudgetTime, LayerBench, LayerTime, PartTime, layer_tables
from anyexperts_jax.bench.step import StepBench, StepTime, step_table
from anyexperts_jax.core.text_table import print_tables
from anyexperts_jax.data import show
from anyexperts_jax.data.example import Example
from anyexperts_jax.report.tables import allocation_table, budget_table, likelihood_table, score_table, separation_table
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.goodput import StepTimes, TimeReport
from anyexperts_jax.train.progress import Reporter, domain_table, routing_table, status_line, time_table

ROWS = ("S1 bfloat16 forward+backward", "capacity 1.25, pallas_triton")
LAYER = LayerTime("S1", "bfloat16", "forward+backward", ROWS[1], 12345.678, 1.234, 123456.7, 0.1234, 15.9)
BENCH = LayerBench(
    {},
    (LAYER,) * 3,
    (PartTime("S1", "bfloat16", "overhead", 12345.678, 0.9999),) * 3,
    (BudgetTime("P4", "bfloat16", "forward+backward", "capacity", 8.0, 12345.678, 1.234, 1.0),) * 3,
)
STEP = StepTime("AnyExperts 8.0, capacity 1.25", 861_234_567, 12345.678, 1_234_567.0, 1.234, 123456.7, 15.9)
WORK = Work({"experts": 1.2345e18, "attention": 2e15}, {"tiles filled up": 1e15}, 10**12, 10**12, 10**12, 10**12, 1e3)
BOUNDS = Bounds(12.345678, 11.1, 10.01, 9.9, (12.3456, 0.1), 0.5)
COMPILED = CompiledStep(
    "v5p:16x16x16", 8, 32768, {"data": 8, "fsdp": 64, "expert": 64}, 16_234_567_890,
    {"state and batch": 2**39, "temporaries": 2**38, "results not in place": 2**20, "program": 2**30}, 2**40,
    (Collective("all-to-all", ("data", "fsdp", "expert"), 123456, 2**40), Collective("all-reduce", (), 1, 2**20)),
    WORK, BOUNDS, 1234.0,
)  # fmt: skip
TRIED = [search.Tried(load_config("small", ["mesh.fsdp=64", "mesh.expert=64", "mesh.tensor=8"]), 1.0, COMPILED)]
RECORD = {
    "domains": {
        "general": {"loss": 12.345, "token_accuracy": 1.0, "exact_match": 1.0, "examples": 12345},
        "own_pictures_of_the_north_sea": {"loss": 1.5, "token_accuracy": 0.75, "exact_match": 0.125, "examples": 7},
    },
    "real_slots": [[107.53, 108.25, None, 106.01]] * 2,
    "virtual_share": [[0.2, 0.1, None, 0.15]] * 2,
    "load_max_over_mean": [123.75] * 2,
    "dropped": [1234567.0] * 2,
    "mean_real_slots": 107.9,
    "nominal_real_slots": 108.0,
}
TIMES = TimeReport({"step": 123456.7, "compile": 1234.5, "validation": 99.9}, 100_000, StepTimes(1.0, 2.0, 3.0))
EVALUATION = evaluation(budgets=(104.8, 105.6, 106.4, 107.2, 108.0, 109.6))
TABLES = {
    "scores": score_table(EVALUATION),
    "right answers": likelihood_table(EVALUATION),
    "budgets": budget_table(EVALUATION),
    "allocation": allocation_table(EVALUATION),
    "separation": separation_table(EVALUATION.separations),
    "validation": domain_table(RECORD),
    "routing": routing_table(RECORD),
    "times": time_table(TIMES),
    "train step": step_table(StepBench({"size": {"dtype": "bfloat16"}}, (STEP,) * 2)),
    "meshes": search.search_table(TRIED, "v5p:16x16x16"),
    **{f"bench {number}": table for number, table in enumerate(layer_tables(BENCH))},
    **{f"compiled {number}": table for number, table in enumerate(step_tables.step_tables(COMPILED))},
}


def on_a_terminal(show_it, width=80) -> str:
    out = io.StringIO()
    show_it(Console(file=out, width=width, color_system=None, highlight=False))
    text = out.getvalue()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_figure_is_printed_whole(name, lines):
    table = TABLES[name]
    text = on_a_terminal(lambda console: print_tables([table], console, lines=lines))
    for row in table.rows:
        for figure in row[table.names :]:
            assert figure in text


def test_the_line_of_a_step_wraps_on_a_narrow_terminal():
    def run(console):
        reporter = Reporter(console)
        reporter.start(0, 50_000)
        reporter.step(20_000, 50_000, status_line(scalars, {"mean_real_slots": 107.9, "dropped_share": 0.123}, 1e7))
        reporter.stop()

    scalars = {"answer_loss": 12.345, "token_accuracy": 1.0}
    out = io.StringIO()
    run(Console(file=out, width=80, force_terminal=True, color_system=None))
    assert "…" not in out.getvalue()
    for figure in ("20000/50000", "12.345", "100%", "107.90", "12.3%", "10,000,000"):
        assert figure in out.getvalue()


def test_examples_are_printed_whole(tmp_path):
    fields = {"domain": "[/red]", "question_type": "a_type_of_a_long_name", "level": 3, "source": "file:" + "x" * 60}
    example = Example(**fields, question="how many [bold]things[/] are there?" * 3, answer="[/red] 12,345")
    text = on_a_terminal(lambda console: console.print(show._table([(123456, example)] * 2, "[/red]")))
    assert "123456" in text
    rows = [line.split("│") for line in text.splitlines() if "│" in line]
    joined = "".join("".join(column) for column in zip(*rows, strict=True)).replace(" ", "")
    assert "[/red]" in joined
    assert "a_type_of_a_long_name" in joined
