"""Writes EvoMoE's page from results: verdicts, tables, pictures. `output` writes AnyExperts' page."""

import pathlib
from collections.abc import Mapping

from anyexperts_jax.core.text_table import TextTable
from experiments.reproduce.claims import BETTER_MARGIN, EQUAL_MARGIN, MIN_SEEDS
from experiments.reproduce.collect import Results
from experiments.reproduce.evomoe_claims import APART, evomoe_findings, main_findings
from experiments.reproduce.evomoe_figures import draw_experts, draw_scores
from experiments.reproduce.evomoe_tables import expert_table, finding_table, variant_table
from experiments.reproduce.experiment import EVOMOE_TABLES
from experiments.reproduce.output import (
    PAGE_NAME,
    QUICK_NOTE,
    Page,
    markdown_table,
    page_text,
    write_csv,
)

SCORES_FIGURE, EXPERTS_FIGURE = "scores.png", "experts.png"
HEADING = "EvoMoE (arXiv 2505.23830), reproduced at a scale anyone can rerun"
NOTE = (
    "The paper fine-tunes models of 0.5B to 7B parameters and tests them on public benchmarks; this is a model of {} "
    "parameters, with its experts, on generated questions about real signals. The paper's figures (Qwen-1.8B) "
    "stand beside ours for their direction, not their size. Runs from copied experts train experts and router in stage "
    "III, for as many steps as stages II and III of the others together. What the paper names without a formula, "
    "contrastive and local entropy, is our reading (evolution/diversity.py)."
)
RULE = (
    f"The rule was fixed before the runs. A claim of something better is supported where the interval of the "
    f"difference, paired by seed, lies above 0, not supported where it lies below {100 * BETTER_MARGIN:g} point, else "
    f"undecided; a claim that nothing changes is supported where it lies above -{100 * EQUAL_MARGIN:g} points, not "
    f"supported where it lies below, else undecided, and below 0 is what is lost. Nats per answer token and overlaps, "
    f"a share of 1, are judged by the same margins, {BETTER_MARGIN:g} and {EQUAL_MARGIN:g}. Experts end apart where "
    f"their mean distance from expert 1 is above {APART:.0%} of its drift, what it has moved from the dense FFN, and "
    f"do not where it is below {APART + BETTER_MARGIN:.0%}. Fewer than {MIN_SEEDS} seeds decide nothing. There are "
    "as many chances to be wrong as there are rows, and intervals over five seeds are a little too narrow."
)


def is_evomoe(names: Mapping[str, Results]) -> bool:
    """Returns whether a page of these tables is EvoMoE's."""
    return set(names) <= set(EVOMOE_TABLES)


def together(results: Mapping[str, Results]) -> Results:
    """Merges all experiments' results; a variant of one name is the same run in each."""
    return Results({key: one for each in results.values() for key, one in each.found.items()})


def write_evomoe_page(page: Page, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes README.md, a CSV for each table and the pictures into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {name: one for name, one in page.results.items() if one.found}
    every = together(there)
    made: dict[str, TextTable] = {"verdicts": finding_table(evomoe_findings(every))}
    made |= {name: variant_table(name, one) for name, one in there.items()}
    made["experts"] = expert_table(every)
    paths = [write_csv(table, folder / f"{name}.csv", page.quick) for name, table in made.items()]
    title = QUICK_NOTE if page.quick else f"EvoMoE at {page.size} parameters"
    pictures = [draw_scores(there, folder / SCORES_FIGURE, title), draw_experts(every, folder / EXPERTS_FIGURE, title)]
    names = [path.name for path in pictures]
    text = folder / PAGE_NAME
    text.write_text(page_text(page, HEADING, NOTE.format(page.size), RULE, list(made.values()), names))
    return [text, *paths, *pictures]


def evomoe_block(page: Page, where: str) -> str:
    """Returns the block of docs/results/evomoe.md: the main verdicts, with links to the page in `where`."""
    whole = finding_table(main_findings(together(page.results)))
    short = TextTable(whole.title, whole.columns[:5], tuple(row[:5] for row in whole.rows))
    return (
        f"![What shuffled routing costs against how far experts end apart]({where}/{EXPERTS_FIGURE})\n\n"
        f"{markdown_table(short)}\n\n"
        f"Routers, diversity, beta, numbers of experts, and scores by domain: [the whole page]({where}/{PAGE_NAME}).\n"
    )
