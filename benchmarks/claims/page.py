"""The ablations page: a verdict, a table and a figure for each claim."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims.base import NO, Claim
from claims.tried import LOG

DOCS = Path(__file__).parents[2] / "docs"
_COLUMNS = 5
COLOURS = ("#9aa5b1", "#2a6f97", "#e07a5f")


def write(result: Mapping[str, Any], claims: Mapping[str, Claim]) -> None:
    """``docs/ablations.md`` and ``docs/figures/ablation-*.svg`` of all claims with results."""
    (DOCS / "figures").mkdir(exist_ok=True)
    found = {name: claim for name, claim in claims.items() if name in result["claims"]}
    lines = [
        "# Ablations", "",
        "The effect of each ingredient of the C-RADIOv4 recipe, with the same seeds with and without it: small ViTs "
        f"({result['width']} channels, 4 blocks), {result['steps']} steps, on two CPU cores "
        "(`python benchmarks/run.py ablations`; every number is in `benchmarks/results/ablations.json`). Mean of "
        f"{result['seeds']} seeds; in brackets their spread (maximum - minimum): if the two arms "
        "differ by no more, the result is inconclusive. A claim that does not hold at this size is reported with what "
        f"was tried ({LOG}).", "",
        "| claim | holds here | numbers |", "| --- | --- | --- |",
    ]  # fmt: skip
    for name in found:
        entry = result["claims"][name]
        lines.append(f"| [{_title(name)}](#{name.replace('_', '-')}) | {_word(entry['holds'])} | {entry['verdict']} |")
    for name, claim in found.items():
        lines += _section(name, claim, result["claims"][name])
    (DOCS / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _title(name: str) -> str:
    return name.replace("_", " ")


def _word(holds: str) -> str:
    return f"**{holds}**" if holds == NO else holds


def _section(name: str, claim: Claim, entry: Mapping[str, Any]) -> list[str]:
    text = " ".join((claim.__doc__ or "").split())
    arms = entry["arms"]
    lines = ["", f"## {_title(name)}", "", text, "", f"Holds here: {_word(entry['holds'])} ({entry['verdict']}).", ""]
    if note := entry.get("note"):
        lines += [f"{note} More in the {LOG}.", ""]
    lines += [f"![{_title(name)}](figures/ablation-{name}.svg)", ""]
    lines += ["| | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
    for metric in next(iter(arms.values())):
        cells = [f"{values[metric]['mean']:.4g} ({values[metric]['spread']:.2g})" for values in arms.values()]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    _figure(name, claim, arms)
    return lines


def _figure(name: str, claim: Claim, arms: Mapping[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "agglo", "font.size": 9})
    from matplotlib import pyplot as plt

    metrics = [m for m in next(iter(arms.values())) if m.startswith(claim.shown)]
    draw = _curves if claim.curve else _bars
    groups = sorted({_group(m) for m in metrics}) if claim.curve else metrics
    columns = min(len(groups), _COLUMNS)
    rows = -(-len(groups) // columns)
    size = (max(4.5, 2.2 * columns), 2.2 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for place in axes.flat[len(groups) :]:
        place.set_visible(False)
    for place, group in zip(axes.flat, groups, strict=False):
        draw(place, group, arms, metrics)
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.28 / size[1], 1, 1))
    figure.savefig(DOCS / "figures" / f"ablation-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, metric: str, arms: Mapping[str, Any], metrics: list[str]) -> None:
    del metrics
    for place, (arm, values) in enumerate(arms.items()):
        seeds = values[metric]["seeds"]
        axes.bar(place, values[metric]["mean"], color=COLOURS[place], width=0.7, label=arm)
        axes.scatter([place] * len(seeds), seeds, color="black", s=8, zorder=3)
    axes.set_xticks([])
    axes.set_title(textwrap.fill(metric, 28), fontsize=8)


def _group(metric: str) -> str:
    return re.sub(r"\d+ ?px", "", metric).replace("at  ", "").strip()


def _curves(axes: Any, group: str, arms: Mapping[str, Any], metrics: list[str]) -> None:
    points = sorted((m for m in metrics if _group(m) == group), key=_size)
    for colour, (arm, values) in zip(COLOURS, arms.items(), strict=False):
        x = [_size(m) for m in points]
        axes.plot(x, [values[m]["mean"] for m in points], color=colour, marker="o", ms=3, label=arm)
        low, high = ([edge(values[m]["seeds"]) for m in points] for edge in (min, max))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_title(group, fontsize=8)
    axes.set_xlabel("side in pixels")


def _size(metric: str) -> int:
    found = re.search(r"\d+", metric)
    return int(found.group()) if found else 0
