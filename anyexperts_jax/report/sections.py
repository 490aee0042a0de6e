"""The report's sections: verdicts, budgets, importance maps, separation, allocation, load, training, set-up."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from anyexperts_jax.core.errors import comma_list
from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.core.names import file_name
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.data.example import Example
from anyexperts_jax.report import tables
from anyexperts_jax.report.budget_curves import draw_budget_curves
from anyexperts_jax.report.charts import draw_load, draw_real_experts, draw_separations, draw_training
from anyexperts_jax.report.example_map import ExampleMap, maps_of
from anyexperts_jax.report.explorer import explore
from anyexperts_jax.report.importance_maps import draw_importance_maps
from anyexperts_jax.report.router_charts import diagnostics_table, draw_densities, draw_shares, draw_similarity
from anyexperts_jax.report.source import ROUTING_EXAMPLES, ReportSource
from anyexperts_jax.report.verdicts import CHANCE_MARGIN, Verdict, usual_budget, verdicts
from anyexperts_jax.train.config import to_json

_WHAT_TO_LOOK_AT = {
    "image": "Are the red patches the outlined ones?",
    "audio": "Are the tall red bars inside the outlined spans?",
    "video": "Are the tall bars over the outlined frames, and the red patches inside the outlines?",
    None: "Are the outlined characters redder than the others?",
}
_NO_ITEM = "no test example can be used"
_STATIC = "Static top-k: every token gets the same number of experts, so there is no importance to show."


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file. On a dark page the lightness of a chart may be inverted, but not that of a painting."""

    title: str
    caption: str  # what to look for
    path: pathlib.Path
    alt: str  # what it shows, for those who do not see it
    kind: Literal["chart", "painting"] = "chart"


@dataclasses.dataclass(frozen=True)
class Listing:
    title: str
    text: str
    open: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page. `missing` says what is missing and which command makes it."""

    anchor: str
    title: str
    text: str = ""
    missing: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[TextTable, ...] = ()
    folded: tuple[TextTable, ...] = ()
    listings: tuple[Listing, ...] = ()
    data: Mapping[str, Any] | None = None  # the questions that the page's script shows


def sections(source: ReportSource, folder: pathlib.Path) -> list[Section]:
    """All sections in the order of the page. Their pictures are written to `folder`."""
    parts: tuple[Callable[[ReportSource, pathlib.Path], Section], ...] = (
        _allocation_verdicts,
        _budgets,
        _follow,
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
        return dataclasses.replace(section, missing=("Not evaluated yet: the checks need an evaluation, see above.",))
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
    usual = usual_budget(result, source.config.model.moe)
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
    ranges = [
        f"{one.domain} {100 * min(scores):.0f} to {100 * max(scores):.0f}%"
        for index, one in enumerate(usual.scores)
        for scores in [[budget.scores[index].score for budget in result.budgets]]
    ]
    picture = Picture(
        "Score and budget",
        caption,
        draw_budget_curves(result, folder / "budget_curves.png"),
        f"A line per domain, over nominal budget, realised budget and forward time: {', '.join(ranges)}.",
    )
    shown = (tables.score_table(result), tables.budget_table(result), tables.allocation_table(result))
    folded = (tables.likelihood_table(result), tables.group_table(usual))
    return dataclasses.replace(section, text=text, pictures=(picture,), tables=shown, folded=folded)


def _follow(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("follow", "Follow a question")
    if not any(source.followed.values()):
        return dataclasses.replace(section, missing=(f"Nothing to follow: {source.no_checkpoint or _NO_ITEM}.",))
    data = source.config.data
    moe = source.config.model.moe
    found = explore(source.followed, moe.num_experts, data.encoding, source.tokenizer)
    text = (
        f"The first test questions of each domain, not chosen, {found.shown} in all, at the window the run was trained "
        "with. Pick a token: click it, or move the slider with the arrow keys. Below it is where each layer sent it. "
        "Pick an expert to see which tokens went there. The right answer follows the question, as in training."
    )
    if found.left_out:
        text += f" {found.left_out} more are left out to keep the page small."
    return dataclasses.replace(section, text=text, data={**found.data, "importance": moe.uses_importance})


def _maps(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("maps", "Importance maps")
    if not source.config.model.moe.uses_importance:
        return dataclasses.replace(section, missing=(_STATIC,))
    if not any(source.followed.values()):
        return dataclasses.replace(section, missing=(f"No maps: {source.no_checkpoint or _NO_ITEM}.",))
    pictures, any_outline = [], False
    for domain, followed in source.followed.items():
        maps = maps_of(followed, source.config.data.encoding, source.tokenizer)
        for media, group in _by_media(maps).items():
            name = f"importance_{file_name(domain)}" + ("" if len(_by_media(maps)) == 1 else f"_{media or 'text'}")
            outlined = any(one.example.has_evidence for one in group)
            any_outline |= outlined
            look = f" {_WHAT_TO_LOOK_AT[media]}" if outlined else ""
            caption = f"The first {len(group)} test examples, not chosen.{look}"
            path = draw_importance_maps(group, folder / f"{name}.png")
            answers = ", ".join(f"“{one.example.answer}”" for one in group)
            alt = f"The tokens of {len(group)} {domain} questions, coloured by importance. Their answers: {answers}."
            pictures.append(Picture(f"{domain}: importance on {media or 'text'}", caption, path, alt, "painting"))
    known = "; the green outlines are known from how the data were made" if any_outline else ""
    text = (
        "Importance decides how many experts a token gets. The model was not told which tokens carry the "
        f"answer{known}. Each panel has its own scale."
    )
    others = [
        name for name, items in source.followed.items() if not all(isinstance(one.item, Example) for one in items)
    ]
    if others:
        text += f" Conversations and documents ({comma_list(others)}) are drawn above, under “Follow a question”."
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
    path = draw_separations(source.separations, folder / "separation.png")
    aucs = ", ".join(f"{one.modality} {tables.figure_text(one.auc)}" for one in source.separations)
    picture = Picture("Separation", caption, path, f"ROC AUC of importance by modality: {aucs}.")
    shown = (tables.separation_table(source.separations), tables.baseline_table(source.separations))
    return dataclasses.replace(section, text=text, pictures=(picture,), tables=shown)


def _real_experts(source: ReportSource, folder: pathlib.Path) -> Section:
    section = Section("real-experts", "Real experts per modality and layer")
    if source.routing is None:
        return dataclasses.replace(section, missing=(f"Not measured: {source.no_checkpoint}.",))
    nominal = source.config.model.moe.expected_real_slots
    path = draw_real_experts(source.routing, nominal, folder / "real_experts.png")
    caption = "Which modality gets more experts than the nominal average, and in which layers?"
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in source.routing.real_slots_by_modality.items())
    alt = f"Real experts per token by MoE layer, a line per modality. Means of layers: {means}; nominal {nominal:.2f}."
    picture = Picture("Real experts per token", caption, path, alt)
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
    worst = max(source.routing.load_max_over_mean)
    alt = f"Slots of each expert over the layer's mean, by layer and modality. The busiest: {worst:.2f} times the mean."
    path = draw_load(source.routing, folder / "load.png")
    picture = Picture("Load of the real experts", caption, path, alt, "painting")
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
            "The density of router logits, a panel per expert and layer, a line per modality.",
        ),
        Picture(
            "Distance between experts",
            "Dark cells off the diagonal are experts that are alike.",
            draw_similarity(source.router, folder / "expert_distance.png"),
            "A matrix of the distances between the experts' weights; the table below has the least.",
            "painting",
        ),
        Picture(
            "Experts by modality",
            "Do modalities use different experts?",
            draw_shares(source.router, folder / "expert_shares.png"),
            "Each expert's share of a modality's real slots, a panel per layer.",
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
    path = draw_training(source.records, folder / "training.png")
    steps = max(record["step"] for record in source.records if record["kind"] == "train")
    alt = f"Losses, answers right, real experts by modality, load and virtual share over {steps} steps."
    return dataclasses.replace(section, pictures=(Picture("Training", caption, path, alt),))


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
