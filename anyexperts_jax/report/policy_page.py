"""Writes a page about a published model by policy and budget: a table, and perplexity against experts and time."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.evaluate.policies import Measured, perplexity, table
from anyexperts_jax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES, _FIGURES, _PAGE = "policies.png", "policies.json", "README.md"


def write_policy_page(found: Sequence[Measured], folder: pathlib.Path, where: str, command: str) -> None:
    """Writes README.md, policies.png and policies.json into a folder, which is created if it is missing.

    Times are relative to the first row, since seconds on one machine say little about another.

    Args:
      found: the result of `measure_policies`.
      where: a description of the text and its size.
      command: the command that made the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_policy_curves(found, folder / _CURVES)
    rows = [
        {
            "policy": one.policy,
            "budget": _plain(one.budget),
            "experts_a_token": _plain(one.realised),
            "perplexity": round(perplexity(one), 4),
            "bits_per_byte": round(one.bits_per_byte, 4),
            "time": round(one.seconds / found[0].seconds, 3),
            "unique_experts": _plain(one.unique),
        }
        for one in found
    ]
    about = {"command": command, "text": where, "versions": versions(), "device": device_text()}
    (folder / _FIGURES).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (folder / _PAGE).write_text(_page(table(found, where, seconds=False), found[0].policy, command))


def draw_policy_curves(found: Sequence[Measured], path: pathlib.Path) -> pathlib.Path:
    """Draws two panels, a line per policy: perplexity against experts per token, and against time."""
    names = list(dict.fromkeys(one.policy for one in found))
    with style.figure(8.0, 3.8, path) as drawn:
        panels = drawn.subplots(1, 2, sharey=True)
        for index, name in enumerate(names):
            own = sorted((one for one in found if one.policy == name), key=lambda one: one.realised)
            _line(panels[0], index, [(one.realised, perplexity(one)) for one in own], name)
            # the oracle's time is that of all its runs, and so not comparable
            timed = [] if name == "oracle" else [(one.seconds / found[0].seconds, perplexity(one)) for one in own]
            _line(panels[1], index, timed, name)
        panels[0].set_xlabel("real experts a token")
        panels[1].set_xlabel(f"time, 1 = {found[0].policy}")
        panels[0].set_ylabel("perplexity")
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(plain_tick)
        panels[0].yaxis.set_minor_formatter(plain_tick)
        for axes in panels:
            axes.grid(True, which="both", axis="y")
            axes.grid(True, axis="x")
        handles, labels = panels[1].get_legend_handles_labels()
        more, others = panels[0].get_legend_handles_labels()
        legend = dict(zip(others + labels, more + handles, strict=True))
        drawn.legend(list(legend.values()), list(legend), loc="outside upper left", ncols=6)
    return path


def plain_tick(value: float, _: int) -> str:
    """Formats a tick of a logarithmic axis: 20, 50, 100."""
    leading = value / 10 ** math.floor(math.log10(value))
    return f"{value:g}" if round(leading, 6) in (1, 2, 3, 5) else ""


def _line(axes: "Axes", index: int, points: Sequence[tuple[float, float]], name: str) -> None:
    kept = [(x, y) for x, y in points if math.isfinite(x)]
    if not kept:
        return
    colour, marker = style.series(index)
    dashed = "--" if index >= len(style.SERIES) else "-"
    x, y = zip(*kept, strict=True)
    axes.plot(x, y, dashed, color=colour, marker=marker, markersize=5, linewidth=1.5, label=style.label(name))


def _page(found: TextTable, first: str, command: str) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    head, *body = ("| " + " | ".join(row) + " |" for row in (found.columns, *found.rows))
    lines = ["# Perplexity by budget and policy", "", f"`{command}`", ""]
    lines += [
        f"On {device_text()}; {packages}.",
        "",
        f"Time is a pass's over that of {first!r}, the oracle's of all its runs.",
    ]
    lines += ["", f"![Perplexity against experts a token, and against time]({_CURVES})", ""]
    return "\n".join([*lines, f"## {found.title}", "", head, "|---" * len(found.columns) + "|", *body]) + "\n"


def _plain(value: float) -> float | None:
    """Replaces NaN, which JSON does not have, by None."""
    return None if math.isnan(value) else round(value, 4)
