# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, statements and plots of `benchmarks.growth`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.common import figure, table

from .fits import Fit, exponent, last_exponent, memory_slope

TITLE = "How cost grows"
COMMAND = "python -m benchmarks.growth --out benchmarks/results/growth.json"
LINEAR = 1.1  # the largest exponent that counts as linear: 26 % more than ten times the time for ten times the work
MEMORY = 10.0  # MB for 1,000 series more: target
INTRODUCTION = """**Synthetic** data. Each line is a process of its own; its peak memory is the largest resident
memory, libraries included. Malloc is as glibc has it by default. Seconds are without imports: median (and range) of
up to three runs, one where a run takes over 30 s; of a batch, each step of three epochs. Files are in the page
cache. The exponent p of seconds ~ x^p is a least-squares fit over all runs, with its 95 % interval; what does not
grow (the start of a run) lowers it, so the exponent between the two largest x is given too."""
# part -> heading, what x is, what it was measured on
PARTS = {
    "slices": (
        "Slices of a series",
        "slices",
        "One uncompressed DICOM series of {long_size} x {long_size} pixels: from its files to predictions.csv "
        "(inference.json of the classifier, random weights), and prepared for pretraining (prepare.json); the configs' "
        "default sizes.",
    ),
    "series": (
        "Series of a tree",
        "series",
        "An RSNA 2023 tree of tiny series (32 x 32 pixels, about 8 slices, one a patient): for comparing numbers of "
        "series, not for forecasting RSNA's. One process without workers.",
    ),
    "volumes": (
        "Volumes of a run",
        "volumes",
        "An evaluation of the classifier and an epoch of pretraining over prepared volumes of 48 x 48 x 16, backbone "
        "test_efficientnet. The arrays of the evaluation's bootstrap (1,000 resamples by patients) "
        "grow until they hold 2 million cells.",
    ),
    "batch": (
        "Batch size",
        "volumes a batch",
        "A pretraining step without loading: volumes of 96 x 96, 11 crops of 32 x 32 of 16 slices, backbone "
        "test_efficientnet.",
    ),
    "workers": (
        "Workers",
        "workers",
        "{worker_volumes} volumes: an epoch of pretraining's loader over prepared volumes of the default size "
        "(workers started before), and preparing them from tiny series (workers started with it). Memory is of the "
        "main process.",
    ),
}
UNITS = {"slices": "slice", "series": "series", "volumes": "volume", "batch": "volume"}  # of the time for one
Rows = list[dict[str, Any]]


def by_step(results: dict[str, Any], part: str) -> dict[str, Rows]:
    """Rows of a part by step, ascending in x."""
    rows = sorted((row for row in results["rows"] if row["part"] == part), key=lambda row: row["x"])
    return {step: [row for row in rows if row["step"] == step] for step in dict.fromkeys(row["step"] for row in rows)}


def lines(part: str, steps: dict[str, Rows]) -> list[list[str]]:
    """Cells of a part's table."""
    found = []
    for step, rows in steps.items():
        first = rows[0]
        for row in rows:
            seconds = row["seconds"]["median"]
            of_x = [f"{row['x'] / first['x']:.1f}"] if first["x"] else []
            one = [f"{1000 * seconds / row['x']:,.2f}"] if part in UNITS else []
            times, memory = seconds / first["seconds"]["median"], row["peak_mb"]["median"]
            cells = [step, f"{row['x']:,}", *of_x, figure(row["seconds"], 3), f"{times:.2f}", *one]
            found.append([*cells, f"{memory:,.0f}", f"{memory / first['peak_mb']['median']:.2f}"])
    return found


def head(part: str, steps: dict[str, Rows]) -> list[str]:
    """Columns of a part's table."""
    x = PARTS[part][1]
    counted = next(iter(steps.values()))[0]["x"] > 0  # there is no multiple of no workers
    one = [f"ms a {UNITS[part]}"] if part in UNITS else []
    return ["step", x, *([f"times the {x}"] * counted), "seconds", "times the seconds", *one, "peak MB", "times the MB"]


def verdict(reached: bool) -> str:
    """How a target is said to have come out."""
    return "reached" if reached else "**MISSED**"


def interval(fit: Fit) -> str:
    """The slope's 95 % interval, if there is one."""
    return f"{fit.low:.2f} to {fit.high:.2f}" if math.isfinite(fit.low) else "two points, no interval"


def linear(step: str, x: str, rows: Rows) -> str:
    """Does the time grow at most as x does?"""
    fit, last = exponent(rows), last_exponent(rows)
    reached = max(fit.slope, last) <= LINEAR
    return (
        f"- {step}: seconds ~ {x}^{fit.slope:.2f} ({interval(fit)}), between the two largest ^{last:.2f}; at most "
        f"linear (target: at most ^{LINEAR}): {verdict(reached)}"
    )


def constant_memory(step: str, rows: Rows) -> str:
    """Does the memory stay, whatever the number of series?"""
    slope = 1000 * memory_slope(rows).slope
    return f"- {step}: {slope:+.1f} MB for 1,000 series more (target: at most {MEMORY:.0f}): {verdict(slope <= MEMORY)}"


def statements(part: str, steps: dict[str, Rows]) -> list[str]:
    """What a part's figures say, computed from them."""
    x = PARTS[part][1]
    if part == "workers":
        return [f"- {step}: {best(rows)}" for step, rows in steps.items()]
    if part == "batch":
        return [f"- {step}: {a_volume(rows)}" for step, rows in steps.items()]
    found = [linear(step, x, rows) for step, rows in steps.items()]
    if part == "series":
        return found + [constant_memory(step, rows) for step, rows in steps.items()]
    for step, rows in steps.items():
        fit = memory_slope(rows)
        found.append(
            f"- {step}: {fit.intercept:,.0f} MB and {fit.slope:.3f} MB a {UNITS[part]} more (least squares), "
            f"{1000 * fit.slope:,.0f} MB for 1,000"
        )
    return found


def best(rows: Rows) -> str:
    """The number of workers that took least, against the first."""
    fastest = min(rows, key=lambda row: row["seconds"]["median"])
    if fastest is rows[0]:
        return f"fastest with {fastest['x']} workers"
    gain = rows[0]["seconds"]["median"] / fastest["seconds"]["median"]
    return f"fastest with {fastest['x']} workers, {gain:.2f} times as fast as with {rows[0]['x']}"


def a_volume(rows: Rows) -> str:
    """Time and memory of one more volume in a batch."""
    first, last = rows[0], rows[-1]
    alone, among = (row["seconds"]["median"] / row["x"] for row in (first, last))
    return (
        f"a volume in a batch of {last['x']} takes {among / alone:.2f} times what it takes in one of {first['x']}; "
        f"each volume more takes {memory_slope(rows).slope:,.0f} MB"
    )


def section(results: dict[str, Any]) -> str:
    """Markdown: a table, statements and a plot a part."""
    found = [INTRODUCTION]
    for part, (title, _, about) in PARTS.items():
        steps = by_step(results, part)
        found.append(f"### {title}")
        if not steps:
            found.append("**Unmeasured**.")
            continue
        found += [about.format(**results["sizes"][part]), table(head(part, steps), lines(part, steps))]
        found += ["\n".join(statements(part, steps)), f"![{title}](benchmarks/growth_{part}.png)"]
    return "\n\n".join(found) + "\n"


def headline(results: dict[str, Any]) -> str | None:
    """Time a slice, and memory by the number of series."""
    slices, series = by_step(results, "slices").get("inference"), by_step(results, "series")
    if not slices or not series:
        return None
    few, many = slices[0], slices[-1]
    slope = 1000 * max(memory_slope(rows).slope for rows in series.values())
    fewest, most = (next(iter(series.values()))[place]["x"] for place in (0, -1))
    return (
        f"Cost: an uncompressed DICOM series of {few['x']:,} slices takes {few['seconds']['median']:.1f} s from files "
        f"to probabilities, one of {many['x']:,} {many['seconds']['median']:.1f} s; index, check and preparation of "
        f"{fewest:,} to {most:,} series take at most {slope:.1f} MB more for 1,000 series more "
        f"({results['machine']['cpu']}, synthetic series)."
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """``growth_<part>.png``: seconds and peak memory by x, a line a step."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        steps = by_step(results, part)
        if steps:
            _plot(part, steps, folder / f"growth_{part}.png")


def _plot(part: str, steps: dict[str, Rows], file: Path) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = picture.subplots(1, 2)
    for step, rows in steps.items():
        x, seconds = [row["x"] for row in rows], [row["seconds"] for row in rows]
        middle = [value["median"] for value in seconds]
        ranges = [[value["median"] - value["low"] for value in seconds], [v["high"] - v["median"] for v in seconds]]
        left.errorbar(x, middle, yerr=ranges, marker="o", capsize=3, label=step)
        right.plot(x, [row["peak_mb"]["median"] for row in rows], marker="o", label=step)
    if part in ("slices", "series", "volumes"):
        left.set(xscale="log", yscale="log")
        right.set(xscale="log")
    left.set(xlabel=PARTS[part][1], ylabel="seconds", title=PARTS[part][0])
    right.set(xlabel=PARTS[part][1], ylabel="peak memory, MB", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    picture.savefig(file, dpi=80)
