"""Writes the result: dial.json with all measurements, and from it the page dial.md and the curve dial.png."""

import dataclasses
import json
import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.evaluate.policies import perplexity_of
from anyexperts_jax.report import style
from anyexperts_jax.report.policy_page import plain_tick
from anyexperts_jax.train.run_dir import write_whole
from experiments.dial.plan import KINDS, MERGED, STATIC, Plan
from experiments.dial.runs import DENSE, Outcome, outcome_from
from experiments.dial.times import Times
from experiments.dial.verdicts import SERIES, Judged, advantage, judge, mean_points
from experiments.reproduce.claims import BETTER_MARGIN, MIN_SEEDS
from experiments.reproduce.output import markdown_table
from experiments.reproduce.statistics import Summary, summarise

JSON_NAME, PAGE_NAME, CURVE_NAME = "dial.json", "dial.md", "dial.png"
# 12 trainings x 200 steps x 8 x 256 tokens = 4.9M tokens: 4 minutes at 20,000 tokens a second, about 20 of the chip's
# 790 TFLOP/s. Some 20 programs are compiled and 120 passes of 32,768 tokens measured in the other 6.
FULL_SIZE = ("--steps", "200", "--batch-size", "8", "--length", "256", "--test-tokens", "32768")
_PATHS = ("model", "train", "test", "run")
_OPTIONS = {"budgets": "budget"}  # fields whose option has another name


@dataclasses.dataclass(frozen=True)
class Result:
    """All measurements, and how they were made."""

    plan: dict[str, Any]  # the options, with digests of model and texts
    outcomes: tuple[Outcome, ...]
    device: str
    versions: dict[str, str]
    times: Times | None = None

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(self.plan["budgets"])

    def with_times(self, times: Times | None) -> "Result":
        """Returns the result with times of its own checkpoints; with any others, the result itself."""
        own = {one.kind: one.id for one in self.outcomes if one.seed == self.plan["seeds"][0] and one.kind in KINDS}
        return dataclasses.replace(self, times=times) if times is not None and times.ids == own else self


def result_of(plan: Plan, outcomes: Sequence[Outcome]) -> Result:
    """Returns the result of a plan on this device."""
    options = json.loads(json.dumps(dataclasses.asdict(plan), default=str))
    return Result({**options, "sources": plan.sources}, tuple(outcomes), device_text(), versions())


def write_result(result: Result, folder: pathlib.Path) -> pathlib.Path:
    """Writes the three files; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JSON_NAME, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    draw_curve(result, folder / CURVE_NAME)
    write_whole(folder / PAGE_NAME, page_text(result))
    return folder / PAGE_NAME


def read_result(folder: pathlib.Path) -> Result:
    """Reads dial.json.

    Raises:
      UserError: if it cannot be read.
    """
    values = parse_json_object(read_text(folder / JSON_NAME, "result"), str(folder / JSON_NAME))
    times = None if values["times"] is None else Times(**values["times"])
    outcomes = tuple(outcome_from(one) for one in values["outcomes"])
    return Result(**{**values, "outcomes": outcomes, "times": times})


def perplexity_table(result: Result) -> TextTable:
    """Returns a row for each series: perplexity and realised experts at each budget, means over seeds."""
    rows = []
    for kind, name in ((DENSE, DENSE), (STATIC, MERGED)):
        found = [
            point.nats for one in result.outcomes if one.kind == kind for point in one.points if point.policy == name
        ]
        label = "dense" if name == DENSE else "merged again after training"
        if found:
            rows.append((label, *[f"{perplexity_of(sum(found) / len(found)):.2f}"] * len(result.budgets)))
    for series in SERIES:
        means = mean_points(result.outcomes, series)
        cells = []
        for budget in result.budgets:
            realised, nats, sd = means.get(budget, (math.nan, math.nan, math.nan))
            spread = "" if math.isnan(sd) else f" ±{perplexity_of(nats) * sd:.2f}"
            cells.append("-" if math.isnan(nats) else f"{perplexity_of(nats):.2f}{spread} at {realised:.2f}")
        if means:
            rows.append((series.label, *cells))
    columns = ("", *(f"{budget:g} experts" for budget in result.budgets))
    return TextTable("Perplexity at the experts that the text really got", columns, tuple(rows))


def verdict_table(result: Result) -> TextTable:
    columns = ("claim", "verdict", "nats a token, mean of budgets", *(f"at {budget:g}" for budget in result.budgets))
    rows = []
    for one in judge(result.outcomes, result.budgets):
        parts = [_interval(one.by_budget[budget]) for budget in result.budgets]
        rows.append((one.statement, _told(one), _interval(one.effect), *parts))
    return TextTable("Verdicts", columns, tuple(rows))


def times_table(times: Times, budgets: Sequence[float]) -> TextTable:
    rows = [
        (label, *(f"{ratios[key]:.2f}" if (key := f"{budget:g}") in ratios else "-" for budget in budgets))
        for label, ratios in times.ratios.items()
        if any(f"{budget:g}" in ratios for budget in budgets)
    ]
    rows += [
        (label, *[f"{ratio:.2f}"] * len(budgets))
        for label, ratios in times.ratios.items()
        for key, ratio in ratios.items()
        if label != DENSE and key not in {f"{budget:g}" for budget in budgets}
    ]
    columns = ("", *(f"{budget:g} experts" for budget in budgets))
    return TextTable("Time of a forward pass, 1 = dense", columns, tuple(rows))


def tables_of(result: Result) -> list[TextTable]:
    """Returns the page's tables."""
    found = [perplexity_table(result), verdict_table(result)]
    return found if result.times is None else [*found, times_table(result.times, result.budgets)]


def draw_curve(result: Result, path: pathlib.Path) -> pathlib.Path:
    """Draws two panels, a line per series: perplexity against realised experts, means over seeds; and how much lower
    the loss is than that of static k at the same experts, mean and range of the seeds.

    The second leaves out the random split, whose loss is several times as far away as all others.
    """
    with style.figure(9.0, 4.4, path) as drawn:
        left, right = drawn.subplots(1, 2)
        for index, series in enumerate(SERIES):
            colour, marker = style.series(index)
            line: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3}
            line["linestyle"] = "--" if index >= len(style.SERIES) else "-"
            means = sorted(mean_points(result.outcomes, series).values())
            if means:
                x, y = zip(*((realised, perplexity_of(nats)) for realised, nats, _ in means), strict=True)
                left.plot(x, y, label=series.label, **line)
            gains = {budget: list(advantage(result.outcomes, series, budget).values()) for budget in result.budgets}
            found = {budget: summarise(values) for budget, values in gains.items() if values}
            if found and series.kind != "random":
                mean_K = [one.mean for one in found.values()]
                ends = [(one.mean - min(gains[budget]), max(gains[budget]) - one.mean) for budget, one in found.items()]
                moved_K = [budget + 0.08 * (index - 3) for budget in found]  # so that whiskers do not hide each other
                right.errorbar(moved_K, mean_K, yerr=list(zip(*ends, strict=True)), capsize=2, **line)
        for outcome in result.outcomes:
            if outcome.kind == DENSE:
                level = perplexity_of(outcome.points[0].nats)
                left.axhline(level, color=style.FAINT, linestyle=":", label="dense")
        left.set_yscale("log")
        left.yaxis.set_major_formatter(plain_tick)
        left.yaxis.set_minor_formatter(plain_tick)
        left.set_ylabel("perplexity of the test text")
        left.set_xlabel("real experts a token and layer, as the text got them")
        right.set_ylabel("nats a token below static k")
        right.set_xlabel("budget, real experts a token and layer")
        for axes in (left, right):
            axes.grid(True)
        drawn.legend(loc="outside upper left", ncols=3)
    return path


def page_text(result: Result) -> str:
    """Returns the page."""
    packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        "# A dense model with a dial",
        "",
        f"`{command_of(result.plan)}`",
        "",
        f"On {result.device}; {packages}.",
        "",
    ]
    trained, wanted = sum(one.kind in KINDS for one in result.outcomes), len(KINDS) * len(result.plan["seeds"])
    lines += [f"**Not finished: {trained} of {wanted} trainings.**", ""] if trained < wanted else []
    lines += [_how(result), "", f"![Perplexity against experts, and the loss below that of static k]({CURVE_NAME})", ""]
    perplexity, verdicts, *times = tables_of(result)
    lines += ["On the right, means and ranges of the seeds; above 0 is better than static k.", ""]
    lines += [f"## {perplexity.title}", "", markdown_table(perplexity), "", _NOTE, ""]
    lines += [f"## {verdicts.title}", "", markdown_table(verdicts), "", _RULE, ""]
    lines += ["## Seconds", "", _times_note(result), ""]
    lines += [line for table in times for line in (markdown_table(table), "")]
    lines += ["## At full size", "", _full_size(result.plan)]
    return "\n".join(lines) + "\n"


def command_of(plan: dict[str, Any], *more: str) -> str:
    """Returns the command with all options that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Plan)}
    words = ["python", "-m", "experiments.dial"]
    for name, value in plan.items():
        if name in defaults and (name in _PATHS or _plain(value) != _plain(defaults[name])):
            values = value if isinstance(value, list) else [value]
            option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
            parts = [(option, *map(_word, values))] if name != "set" else [(option, _word(one)) for one in values]
            words += [word for part in parts for word in part]
    return shlex.join([*words, *more])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_NOTE = (
    "Means over seeds, ± their sample deviation. The number after the perplexity is the mean of real experts over all "
    "tokens and layers, without the shared ones. Each policy was set so that the test text gets the budget. For the "
    "verdicts, the rest of the difference is removed by interpolating static k between the numbers of experts at which "
    "it was measured. Static k, static per layer, the threshold and shuffled K are measured on the static checkpoint."
)
_RULE = (
    "The rule is the reproduction's (`experiments/reproduce/claims.py`), with its margin in nats. A claim is supported "
    f"where the interval of the difference lies above 0, not supported where it lies below {BETTER_MARGIN:g} nats (a "
    f"gain of {100 * BETTER_MARGIN:g}% of perplexity is excluded), else undecided; with fewer than {MIN_SEEDS} seeds "
    "nothing is decided. Differences are paired by seed and positive where the first named has the lower loss. "
    "Intervals are those of the percentile bootstrap over seeds; with three seeds they are too narrow. They show how "
    "much trainings differ, not how much texts do: all seeds share the test text."
)


def _how(result: Result) -> str:
    plan = result.plan
    routed, tokens = plan["experts"] - plan["shared"], plan["steps"] * plan["batch_size"] * plan["length"]
    trained = [one.train_seconds for one in result.outcomes if one.train_seconds is not None]
    seconds = (
        f"; a training took {sum(trained) / len(trained):.0f} s, on a machine that may have been busy"
        if trained
        else ""
    )
    return (
        f"Every dense network is cut into {plan['experts']} experts of equal size, {plan['shared']} of them shared; a "
        f"token has {routed} others to choose among. Each of {len(plan['seeds'])} seeds has four trainings: a split by "
        "activations and one at random, both with the same number of experts for every token, and the split by "
        "activations with attached slots, by the paper's terms and by salience. Only routing trains. The loss is the "
        "divergence from the model itself with all experts on, which is the dense model. Each step draws one of the "
        f"budgets {', '.join(map(str, plan['budgets']))}. Seeds differ in the data's order, the new parameters and the "
        "random split; the budgets come in the same order. "
        f"All take {plan['steps']} steps of {plan['batch_size']} x {plan['length']} tokens of the training text, "
        f"{tokens:,} in all{seconds}. The test text is {plan['test_tokens']:,} tokens.\n\n"
        f"Attached slots have {plan['virtual']} virtual experts, which return zero, and a window of {plan['width']:g} "
        "slots; up to a fifth of a token's slots may be virtual. D2DMoE's threshold keeps the experts whose predicted "
        "norm is at least a share of the token's largest (the policy `score_gap`); shuffled K gives the numbers of "
        "`top_p` to the tokens at random."
    )


def _told(one: Judged) -> str:
    worse = one.effect.n >= MIN_SEEDS and one.effect.high < 0
    return f"{one.verdict}: it is the other way round" if worse else one.verdict


def _interval(one: Summary) -> str:
    if one.n == 0:
        return "-"
    return f"{one.mean:+.3f}" if math.isnan(one.low) else f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _times_note(result: Result) -> str:
    times = result.times
    if times is None:
        return "Not measured yet: `" + command_of(result.plan, "--times") + "` does so on a quiet machine."
    load = "" if times.others_load is None else f"; other processes kept {times.others_load:.2f} cores busy"
    return (
        f"Medians of {times.rounds} interleaved rounds of a forward pass over {times.tokens} tokens, with the "
        f"checkpoints of the first seed, on {times.device}{load}. The dense model takes {times.dense_seconds:.2f} s."
    )


def _full_size(plan: dict[str, Any]) -> str:
    changed = {
        name: value
        for name, value in plan.items()
        if name not in ("steps", "batch_size", "length", "test_tokens", "set")  # its overrides suit this device
    }
    return (
        f"`{command_of(changed, *FULL_SIZE)}`\n\n"
        "is sized to ten minutes of an H200. It has not been run. Its twelve trainings take four minutes at 20,000 "
        "tokens a second, a small part of what the chip's arithmetic allows; the other six are for compiling and "
        "measuring."
    )
