# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantities, what each is compared with, and the targets: from measured values to rows of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common import interleaved, ratio, spread

OURS, ORIGINAL = "ours", "original's structure"
PERSISTENT, IN_MEMORY = "MONAI PersistentDataset", "MONAI CacheDataset"
WITH_GRADIENT = "original's structure, gradient into the teacher"
CONTIGUOUS = "contiguous float32"

Measured = dict[str, dict[str, list[float]]]  # key -> variant -> values


@dataclass(frozen=True)
class Quantity:
    """One row: the values of one or two variants, their ratio, and a target.

    Args:
        part: of the benchmark, as in ``--only``.
        key: of the measurement.
        name: for the table.
        over, under: the ratio's variants; without `under` the values themselves are what counts.
        at_least, at_most: target of the ratio, or of the values.
        unit: of the values.
    """

    part: str
    key: str
    name: str
    over: str = ORIGINAL
    under: str | None = OURS
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "s"


STAGES = ("decode", "crop to the body", "window", "resize", "slices and the rest", "network")
QUANTITIES = (
    Quantity("data", "cached", "volume to crops and labels, cached, beside .nii.gz", at_least=500),
    Quantity("data", "cached", "volume to crops and labels, cached", PERSISTENT),
    Quantity("data", "cached", "volume to crops and labels, cached", IN_MEMORY),
    Quantity("data", "uncached .nii.gz", "volume to crops and labels, .nii.gz, no cache"),
    Quantity("data", "uncached .nii", "volume to crops and labels, .nii, no cache"),
    Quantity("crops", "floats", "crop and label, copied to the float batch", at_least=50),
    Quantity("crops", "views", "crop and label, as the transform gives them (views)"),
    Quantity("loss", "loss", "loss, forward and backward, batch 4"),
    Quantity("ema", "ema", "moving average of the teacher"),
    Quantity("step", "step", "pretraining step, batch 1", at_least=2.0),
    Quantity("step", "step", "pretraining step, batch 1", WITH_GRADIENT, at_least=2.0),
    Quantity("step", "share", "loss and moving average in a step", "loss and moving average", "step", at_most=0.03),
    Quantity("memory", "memory", "peak memory of the step", OURS, ORIGINAL, at_most=0.65, unit="MB"),
    Quantity("memory", "memory", "peak memory of the step", OURS, WITH_GRADIENT, at_most=0.65, unit="MB"),
    Quantity("stall", "stall", "epoch with its loader, beside one without data", "with loader", "without data",
             at_most=1.10),
    Quantity("classifier", "classifier", "classifier step", CONTIGUOUS, at_least=1.5),
    Quantity("series", "series", "DICOM series, uncompressed, to probabilities", OURS, None, at_most=15.0),
    *(Quantity("series", stage, f"of that: {stage}", OURS, None) for stage in STAGES),
    Quantity("series", "series RLE", "the same series, RLE compressed, to probabilities", OURS, None),
    Quantity("index", "index", "index, a series of a tree", OURS, None),
    Quantity("index", "preparation", "preparation, a series, written to the cache", OURS, None),
)  # fmt: skip
PARTS = tuple(dict.fromkeys(quantity.part for quantity in QUANTITIES))


def measure_parts(actions: Mapping[str, Callable[[dict[str, Any]], Measured]], task: dict[str, Any]) -> dict[str, Any]:
    """The task's parts, one after the other."""
    found: Measured = {}
    for part in task["parts"]:
        found |= actions[part](task)
    return {"measured": found}


def timed(
    actions: Mapping[str, Callable[[], Any]], repeats: int, calls: Mapping[str, int] | None = None, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of one call, by `common.interleaved`; what is too short to be timed alone runs `calls` times in a row."""
    numbers = {name: (calls or {}).get(name, 1) for name in actions}

    def several(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(numbers[name]):
                actions[name]()

        return run

    seconds = interleaved({name: several(name) for name in actions}, repeats, warmup)
    return {name: [value / numbers[name] for value in values] for name, values in seconds.items()}


def _reached(value: float, quantity: Quantity) -> bool | None:
    if quantity.at_least is not None:
        return value >= quantity.at_least
    return None if quantity.at_most is None else value <= quantity.at_most


def rows(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """The rows of what was measured; the median decides whether a target is reached."""
    found = []
    for quantity in QUANTITIES:
        if quantity.key not in measured:
            continue
        names = [quantity.over] if quantity.under is None else [quantity.over, quantity.under]
        variants = {name: list(measured[quantity.key][name]) for name in names}
        compared = None if quantity.under is None else ratio(*variants.values())
        counts = spread(variants[quantity.over]) if compared is None else compared
        found.append({
            "part": quantity.part, "quantity": quantity.name, "unit": quantity.unit, "variants": variants,
            "ratio": compared, "target": {"at_least": quantity.at_least, "at_most": quantity.at_most},
            "reached": _reached(counts["median"], quantity),
        })  # fmt: skip
    return found
