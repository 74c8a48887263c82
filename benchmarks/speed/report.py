# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, headline and plot of the speed benchmark's results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import figure, spread, table
from .rows import CONTIGUOUS, IN_MEMORY, ORIGINAL, OURS, PERSISTENT, QUANTITIES

TITLE = "Speed beside the original and beside MONAI's caches"
COMMAND = "python -m benchmarks.speed --out benchmarks/results/speed.json && python -m benchmarks.document"
PLOT = "speed.png"
# issue's number of the target -> the parts that it is about
TARGETS = {
    "1. data path": ("data", "crops"),
    "2. pretraining step": ("step", "memory"),
    "3. classifier step": ("classifier",),
    "4. a DICOM series to probabilities": ("series",),
    "5. what a step waits for": ("stall",),
    "Parts of a step": ("loss", "ema"),
    "Index and preparation": ("index",),
}
SHARE = "loss and moving average in a step"
"""A row of the steps that belongs to target 5."""

Row = Mapping[str, Any]


def _value(row: Row, variant: str) -> str:
    """Median with its range, in the unit that reads best."""
    values = row["variants"][variant]
    if row["unit"] == "MB":
        return f"{statistics.median(values):,.0f} MB"
    scale, unit = (1, "s") if statistics.median(values) >= 0.5 else (1e3, "ms")
    return f"{figure(spread([scale * value for value in values]))} {unit}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return ""
    low = row["target"]["at_most"] is not None
    if all(len(values) == 1 for values in row["variants"].values()):  # one run: no range
        return f"{row['ratio']['median']:.3f}"
    return figure(row["ratio"], 3 if low else 1 if row["ratio"]["median"] >= 10 else 2)


def _target(row: Row) -> tuple[str, str]:
    target = row["target"]
    if row["reached"] is None:
        return "", ""
    bound = f"at least {target['at_least']:g}" if target["at_least"] is not None else f"at most {target['at_most']:g}"
    return bound + (" s" if row["ratio"] is None else ""), "reached" if row["reached"] else "**MISSED**"


def _line(row: Row) -> list[str]:
    over, *under = row["variants"]
    first = f"{over}: {_value(row, over)}"
    second = f"{under[0]}: {_value(row, under[0])}" if under else ""
    return [row["quantity"], first, second, _ratio(row), *_target(row)]


def as_text(rows: Sequence[Row]) -> str:
    """All rows as one Markdown table."""
    head = ["quantity", "numerator", "denominator", "ratio", "target", ""]
    return table(head, [_line(row) for row in rows])


def _of(rows: Sequence[Row], title: str) -> list[Row]:
    parts = TARGETS[title]
    share = [row for row in rows if row["quantity"] == SHARE]
    own = [row for row in rows if row["part"] in parts and row["quantity"] != SHARE]
    return share + own if "stall" in parts else own


def section(results: Mapping[str, Any]) -> str:
    """What was measured, target by target."""
    sizes, rows = results["inputs"], results["rows"]
    text = [
        f"**Synthetic** input: a phantom of {sizes['size']} x {sizes['size']} pixels, as an uncompressed DICOM series"
        f" of {sizes['dicom_slices']} slices and as NIfTI of {sizes['nifti_slices']}. The bundles' own configs at their"
        " default sizes, without the intensity augmentation of random crops (`augment_prob 0`), as the original has"
        " none; a cached item is read again and again (100 different volumes, augmented: see Workers below). Medians"
        " with the smallest and largest value in brackets,"
        f" {results['repeats']} runs each where nothing else is said, what is compared taking turns in one process; a"
        " ratio is the numerator over the denominator, run by run. Reading is without workers where nothing"
        f" else is said, of files in the page cache. All processes have the same threads"
        f" ({results['machine']['threads']}). Where times are compared, both have the same settings of malloc"
        f" ({', '.join(f'`{name}={value}`' for name, value in results['malloc'].items())}), so no gain is theirs;"
        " seconds that are compared with nothing are under its default."
        f"\n\nRows that reach their target: {_reached(rows)}. The original's"
        " structure is written again from its description (`benchmarks/reference.py`);"
        " `tests/benchmarks/test_reference.py` holds its labels, slices and crops equal to ours, and within rounding"
        " its loss with gradient (under the published options), moving average and embeddings, and the classifier's"
        " logits in both memory formats. The loss that is timed is our default one, which differs in its"
        " gradient and, at batch 1, has no inter term. Not equal is the original's way to a"
        " prepared volume: foreground by its own threshold, trilinear resizing. MONAI's caches"
        " (`benchmarks/monai_caches.py`) hold what this way gives as uint8 slices, as our cache does ours.\n"
    ]  # fmt: skip
    for title in TARGETS:
        note = NOTES.get(title, "").format(epoch=sizes["epoch"], stalls=_runs(rows, "stall"))
        text.append(f"### {title}\n\n{note}{as_text(_of(rows, title))}\n")
    return "\n".join([*text, f"![Ratios beside their targets](benchmarks/{PLOT})\n"])


def _reached(rows: Sequence[Row]) -> str:
    """How many rows of each target reach it."""
    judged = {title: [row["reached"] for row in _of(rows, title) if row["reached"] is not None] for title in TARGETS}
    return "; ".join(f"{title} {sum(found)} of {len(found)}" for title, found in judged.items() if found)


NOTES = {
    "1. data path": "From a file, or a cached volume, to the float crops and labels of a batch of one. The original's"
    " chain has no cache: beside cached volumes it takes its turn with all that it does at every step. The target of"
    " crops is judged by what the network takes, float copies on both sides; views are what they are copied from.\n\n",
    "2. pretraining step": "One volume a step: forward, backward, optimizer, moving average. In the original's"
    " structure the teacher's forward builds a graph. Its published loss does not stop the gradient into the teacher"
    " either, whose projector it trains so: rows that say so have that gradient, the others stop it at the teacher's"
    " embeddings, which is the harder comparison. Memory is all that a process of its own had resident at most,"
    " libraries included, one process and one run a variant.\n\n",
    "3. classifier step": "Forward and backward of one series.\n\n",
    "4. a DICOM series to probabilities": "By the transforms and the network of the bundle's `inference.json`, decoding"
    " included, imports and the reading of weights not; random weights; malloc as glibc has it by default. Target and"
    " stages are of the uncompressed series.\n\n",
    "5. what a step waits for": "Loss and moving average at batch 1 in seconds of a step, each timed alone; epochs of"
    " {epoch} cached volumes with the bundle's own loader and workers, which were started before, beside as many steps"
    " on one batch in memory ({stalls} of each, in turns).\n\n",
    "Index and preparation": "Of a tree of small series, files listed afresh; of the DICOM series; malloc as glibc has"
    " it by default.\n\n",
}


def _find(rows: Sequence[Row], part: str, over: str, under: str | None = OURS) -> Row:
    wanted = {over} if under is None else {over, under}
    return next(row for row in rows if row["part"] == part and set(row["variants"]) == wanted)


def _runs(rows: Sequence[Row], key: str) -> int:
    """How often a quantity's variants were measured."""
    name = next(quantity.name for quantity in QUANTITIES if quantity.key == key)
    return next(len(values) for row in rows if row["quantity"] == name for values in row["variants"].values())


def _times(row: Row) -> str:
    value = row["ratio"]["median"]
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def headline(results: Mapping[str, Any]) -> str:
    """One sentence for the README."""
    rows = results["rows"]
    share = _find(rows, "memory", OURS, ORIGINAL)["ratio"]["median"]
    seconds = statistics.median(_find(rows, "series", OURS, None)["variants"][OURS])
    return (
        "Speed: the crops of a prepared volume, not augmented, come"
        f" {_times(_find(rows, 'data', ORIGINAL))} times as fast as by the original's"
        f" chain, which has no cache, {_times(_find(rows, 'data', PERSISTENT))} times as fast as from MONAI's"
        f" PersistentDataset and {_times(_find(rows, 'data', IN_MEMORY))} times as fast as from its CacheDataset, which"
        f" holds all in memory; a pretraining step is {_times(_find(rows, 'step', ORIGINAL))} times as fast as in the"
        f" original's structure, at {100 * share:.0f} % of its memory; a classifier step"
        f" {_times(_find(rows, 'classifier', CONTIGUOUS))} times as fast as in contiguous float32;"
        f" {results['inputs']['dicom_slices']} uncompressed DICOM slices become probabilities in {seconds:.1f} s;"
        f" rows that reach their target: {_reached(rows)} ({results['machine']['cpu']})."
    )


def plots(results: Mapping[str, Any], folder: Path) -> None:
    """How many times faster, with range and target, on a logarithmic axis."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["ratio"] and OURS in row["variants"] and row["unit"] == "s"]
    names = [f"{row['quantity']}\n(beside {next(iter(row['variants']))})" for row in rows]
    picture = Figure(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    axes = picture.add_subplot()
    places = range(len(rows))
    middle = [row["ratio"]["median"] for row in rows]
    around = [[value - row["ratio"]["low"] for value, row in zip(middle, rows, strict=True)],
              [row["ratio"]["high"] - value for value, row in zip(middle, rows, strict=True)]]  # fmt: skip
    axes.barh(places, middle, xerr=around, color="#4878a8", height=0.6, label="measured, with its range")
    aims = [(row["target"]["at_least"], place) for row, place in zip(rows, places, strict=True)]
    reached = [aim for aim in aims if aim[0] is not None]
    axes.plot(*zip(*reached, strict=True), "k|", markersize=14, markeredgewidth=2, label="target")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="times faster")
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower right")
    folder.mkdir(parents=True, exist_ok=True)
    picture.savefig(folder / PLOT, dpi=80)
