"""The report's sections: verdicts, budgets, importance maps, separation, allocation, load, training, set-up."""

import dataclasses
import pathlib
from collections.abc import Callable

from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.core.names import file_name
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.report import tables
from anyexperts_jax.report.budget_curves import draw_budget_curves
from anyexperts_jax.report.charts import draw_load, draw_real_experts, draw_separations, draw_training
from anyexperts_jax.report.example_map import ExampleMap
from anyexperts_jax.report.importance_maps import draw_importance_maps
from anyexperts_jax.report.router_charts import diagnostics_table, draw_densities, draw_shares, draw_similarity
from anyexperts_jax.report.source import ROUTING_EXAMPLES, ReportSource
from anyexperts_jax.report.verdicts import CHANCE_MARGIN, Verdict, verdicts
from anyexperts_jax.train.config import to_json

_WHAT_TO_LOOK_AT = {
    "image": "Are the red patches the outlined ones?",
    "audio": "Are the tall red bars inside the outlined spans?",
    "video": "Are the tall bars over the outlined frames, and the red patches inside the outlines?",
    None: "Are the outlined characters redder than the others?",
}
_STATIC = "Static top-k: every token gets the same number of experts, so there is no importance to show."


@dataclasses.dataclass(frozen=True)
class Picture:
    title: str
    caption: str  # what to look for
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Listing:
    title: str
    text: str
    open: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page. `missing` says what is missing and how to make it."""

    anchor: str
    title: str
    text: str = ""
    missing: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[TextTable, ...] = ()
    folded: tuple[TextTable, ...] = ()
    listings: tuple[Listing, ...] = ()


def sections(source: ReportSource, folder: pathlib.Path) -> list[Section]:
    """All sections in the order of the page. Their pictures are written to `folder`."""
    parts: tuple[Callable[[ReportSource, pathlib.Path], Section], ...] = (
        _allocation_verdicts,
        _budgets,
        _maps,
        _separation,
        _real_experts,
        _load,
        _router,
        _training,
        _set_up,
    )
    return [part(source, folder) for part in parts]


def _evaluate_first(source: ReportSource) -> str:
    return f"Not evaluated yet: run `anyexperts evaluate {source.root}` and then the report again."


def _examples(source: ReportSource, count: int) -> str:
    fewer = ", or all that a folder has" if source.config.data.folders else ""
    return f"{count} test examples of each domain{fewer}"


def _allocation_verdicts(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("verdicts", "Does it learn to allocate?")
    if source.evaluation is None:
        return dataclasses.replace(section, missing=(_evaluate_first(source),))
    found = verdicts(source.evaluation, source.config.model.moe)
    text = (
        f"{sum(one.met for one in found)} of {len(found)} are met. A score is wanted {CHANCE_MARGIN:g} standard errors "
        "above chance, the best constant answer to each question type."
    )
    if source.evaluation.step != source.step and source.step is not None:
        text += f" The evaluation is of step {source.evaluation.step}, the maps below are of step {source.step}."
    return dataclasses.replace(section, text=text, verdicts=tuple(found))


def _budgets(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("budgets", "Scores against the budget")
    result = source.evaluation
    if result is None:
        return dataclasses.replace(section, missing=(_evaluate_first(source),))
    usual = min(result.budgets, key=lambda one: abs(one.budget - source.config.model.moe.expected_real_slots))
    caption = (
        "How far left can a line go before it falls? Bars are one standard error; ticks at the left edge are chance, "
        "the best constant answer to each question type on the same examples."
    )
    text = (
        f"One checkpoint, step {result.step}, at each budget without retraining, on {tables.examples_text(result)}. "
        "Windows are calibrated on the validation split; realised averages are of the test "
        "split. Dropped slots are those of the test sequences read whole; answers are generated without dropping any. "
        f"Times are medians of interleaved runs of one compiled program on {result.device}."
    )
    picture = Picture("Score and budget", caption, draw_budget_curves(result, folder / "budget_curves.png"))
    shown = (tables.score_table(result), tables.budget_table(result), tables.allocation_table(result))
    folded = (tables.likelihood_table(result), tables.group_table(usual))
    return dataclasses.replace(section, text=text, pictures=(picture,), tables=shown, folded=folded)


def _maps(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("maps", "Importance maps")
    if not source.config.model.moe.uses_importance:
        return dataclasses.replace(section, missing=(_STATIC,))
    if not source.maps:
        return dataclasses.replace(section, missing=(f"No maps: {source.no_checkpoint}.",))
    pictures = []
    for domain, maps in source.maps.items():
        for media, group in _by_media(maps).items():
            name = f"importance_{file_name(domain)}" + ("" if len(_by_media(maps)) == 1 else f"_{media or 'text'}")
            caption = f"The first {len(group)} test examples, not chosen. {_WHAT_TO_LOOK_AT[media]}"
            path = draw_importance_maps(group, folder / f"{name}.png")
            pictures.append(Picture(f"{domain}: importance on {media or 'text'}", caption, path))
    text = (
        "Importance decides how many experts a token gets. The model was not told which tokens carry the answer; the "
        "green outlines are known from how the data were made. Each panel has its own scale."
    )
    return dataclasses.replace(section, text=text, pictures=tuple(pictures))


def _by_media(maps: list[ExampleMap]) -> dict[str | None, list[ExampleMap]]:
    groups: dict[str | None, list[ExampleMap]] = {}
    for one in maps:
        groups.setdefault(one.example.media, []).append(one)
    return groups


def _separation(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("separation", "Importance against the answer's tokens")
    if not source.config.model.moe.uses_importance:
        return dataclasses.replace(section, missing=(_STATIC,))
    if not source.separations:
        why = source.no_checkpoint or "the examples mark no evidence"
        return dataclasses.replace(section, missing=(f"Not measured: {why}.",))
    caption = (
        "Points right of the dashed line: importance ranks evidence above background. Compare with the grey marks: "
        "contrast is the spread of a patch's pixels or a chunk's log-mel values, position ranks earlier tokens higher."
    )
    text = (
        f"Over {_examples(source, source.routing_examples)}. The area under the ROC curve is the chance that "
        "a token that carries the answer has higher importance than another media or question token of its modality."
    )
    picture = Picture("Separation", caption, draw_separations(source.separations, folder / "separation.png"))
    shown = (tables.separation_table(source.separations), tables.baseline_table(source.separations))
    return dataclasses.replace(section, text=text, pictures=(picture,), tables=shown)


def _real_experts(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("real-experts", "Real experts per modality and layer")
    if source.routing is None:
        return dataclasses.replace(section, missing=(f"Not measured: {source.no_checkpoint}.",))
    nominal = source.config.model.moe.expected_real_slots
    path = draw_real_experts(source.routing, nominal, folder / "real_experts.png")
    caption = "Which modality gets more experts than the nominal average, and in which layers?"
    picture = Picture("Real experts per token", caption, path)
    shown = tables.routing_table(source.routing, MODALITY_NAMES)
    text = f"At the window the run was trained with, over {_examples(source, source.routing_examples)}."
    return dataclasses.replace(section, text=text, pictures=(picture,), tables=(shown,))


def _load(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("load", "Expert load")
    if source.routing is None:
        return dataclasses.replace(section, missing=(f"Not measured: {source.no_checkpoint}.",))
    caption = (
        "White is the mean load, red twice the mean or more, blue an idle expert. Even rows under all tokens with "
        "uneven ones under a modality mean experts that specialise."
    )
    picture = Picture("Load of the real experts", caption, draw_load(source.routing, folder / "load.png"))
    return dataclasses.replace(section, pictures=(picture,))


def _router(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("router", "Experts and router")
    if source.router is None:
        why = source.no_checkpoint or "only measured for models with static slots or a per-modality router"
        return dataclasses.replace(section, missing=(f"Not measured: {why}.",))
    text = (
        f"EvoMoE's diagnostics on {_examples(source, ROUTING_EXAMPLES)}. If the experts are alike, shuffling a token's "
        "logits among them costs nothing. If the logits of two modalities have the same distribution, the router does "
        "not distinguish them."
    )
    pictures = (
        Picture(
            "Router logits by modality",
            "Do the lines of two modalities lie apart?",
            draw_densities(source.router, folder / "router_logits.png"),
        ),
        Picture(
            "Distance between experts",
            "Dark cells off the diagonal are experts that are alike.",
            draw_similarity(source.router, folder / "expert_distance.png"),
        ),
        Picture(
            "Experts by modality",
            "Do modalities use different experts?",
            draw_shares(source.router, folder / "expert_shares.png"),
        ),
    )
    return dataclasses.replace(section, text=text, pictures=pictures, tables=(diagnostics_table(source.router),))


def _training(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("training", "Training")
    if not any(record["kind"] == "train" for record in source.records):
        return dataclasses.replace(section, missing=("No records: metrics.jsonl has no training step.",))
    caption = (
        "Losses should fall together; a widening gap is overfitting. Numbers of real experts that diverge by modality "
        "show that allocation is learned. Load should stay below the dashed line. The router's losses, at the bottom, "
        "are unweighted: balance is 1 if load or scores are even, and that of salience rises as importances diverge."
    )
    return dataclasses.replace(
        section, pictures=(Picture("Training", caption, draw_training(source.records, folder / "training.png")),)
    )


def _set_up(source: ReportSource, folder: pathlib.Path) -> Section:
    result = source.evaluation
    root = source.root
    budgets = "" if result is None else " --budget " + " ".join(f"{one.budget:g}" for one in result.budgets)
    commands = [
        f"anyexperts train {root}/config.json --run OTHER_RUN",
        f"anyexperts evaluate {root}{budgets}",
        f"anyexperts report {root}",
    ]
    device, packages = (device_text(), versions()) if result is None else (result.device, result.versions)
    lines = [f"{name} {version}" for name, version in packages.items()]
    return Section(
        "set-up",
        "Set-up",
        listings=(
            Listing("Commands to reproduce this", "\n".join(commands), open=True),
            Listing(f"Versions, on {device}", "\n".join(lines), open=True),
            Listing("Configuration", to_json(source.config)),
        ),
    )
