# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One network: trained for some seconds, measured, in a process of `common.in_bundle`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.bundle_parts import parse
from benchmarks.common import spread
from benchmarks.pretraining import Pretraining, collated, series_dataset
from benchmarks.windows import position_baselines

TICKS = 1000  # of the learning rate's schedule, which follows the clock: how many steps there will be is not known


def measure_each(task: dict[str, Any]) -> dict[str, Any]:
    """`measure` for each of ``tasks``, which share the data: ``rows``."""
    data = {name: task[name] for name in ("training", "held_out", "cache")}
    key = [{"network": one["network"], "seed": one["settings"]["seed"]} for one in task["tasks"]]
    return {"rows": [name | measure(one | data) for name, one in zip(key, task["tasks"], strict=True)]}


def fill_cache(task: dict[str, Any]) -> dict[str, Any]:
    """Prepare all volumes of a task; every network of a comparison takes the same ones. ``volumes``: how many."""
    parser = parse(task["configs"], task["settings"])
    parts = (("training", "train"), ("held_out", "validate"))
    return {"volumes": sum(len(series_dataset(parser, task[name], part, task["cache"])) for name, part in parts)}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Step time and peak memory while training for ``seconds``, FLOP of a step, position accuracy after, and for the
    first seed before.

    Args:
        task: ``configs``, ``settings`` and ``replaced`` of `Pretraining`; ``training`` and ``held_out`` series;
            ``cache``; ``seconds``.
    """
    pretraining = Pretraining(task["configs"], task["settings"], TICKS, task["replaced"])
    training = series_dataset(pretraining.parser, task["training"], "train", task["cache"])
    held_out = series_dataset(pretraining.parser, task["held_out"], "validate", task["cache"])
    batches = [collated(held_out, [number]) for number in range(len(held_out))]
    before = peak_mb(pretraining.device)
    seconds = train(pretraining, training, task["seconds"])
    peak = peak_mb(pretraining.device)  # before anything but training needs memory
    accuracy = pretraining.position_accuracy(batches)
    gflop = flop(pretraining, training_batch(pretraining, training, 0)) / 1e9
    volumes, counted = pretraining.parser["batch_size"], seconds[1:] or seconds  # the first step warms up
    return {
        "parameters": sum(one.numel() for one in pretraining.part("network_def").parameters()),
        "steps": len(seconds),
        "step_seconds": spread(counted),
        "volumes_per_second": volumes / float(np.median(counted)),
        "gflop_per_volume": gflop / volumes,
        "training_mb": peak,
        "before_mb": before,
        "position_accuracy": accuracy,
        "position_baselines": position_baselines(np.concatenate([batch["overlap"].numpy() for batch in batches])),
        "position_accuracy_untrained": _untrained(task, batches) if pretraining.parser["seed"] == 0 else None,
    }


def _untrained(task: dict[str, Any], batches: list[dict[str, Any]]) -> float:
    pretraining = Pretraining(task["configs"], task["settings"], TICKS, task["replaced"])
    return pretraining.position_accuracy(batches)


def train(pretraining: Pretraining, dataset: Any, limit: float) -> list[float]:
    """Seconds of each step, until they make up `limit`; making batches is not counted."""
    seconds: list[float] = []
    while sum(seconds) < limit:
        batch = training_batch(pretraining, dataset, len(seconds))
        start = time.perf_counter()
        pretraining.step(batch, advance=False)
        seconds.append(time.perf_counter() - start)
        while pretraining.schedule.last_epoch < min(sum(seconds) / limit, 1.0) * TICKS:
            pretraining.schedule.step()
    return seconds


def training_batch(pretraining: Pretraining, dataset: Any, step: int) -> dict[str, Any]:
    """Volumes and windows are a function of seed and step: every network sees the same ones."""
    rng = np.random.default_rng([pretraining.parser["seed"], step])
    items = rng.permutation(len(dataset))[: pretraining.parser["batch_size"]]
    return collated(dataset, [int(item) + step * len(dataset) for item in items])


def peak_mb(device: torch.device) -> float:
    """Largest memory so far: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return common.peak_mb()


@torch.no_grad()
def flop(pretraining: Pretraining, batch: dict[str, Any]) -> int:
    """Floating-point operations of convolutions and matrix products in a step.

    PyTorch's counter takes the forward passes of student and teacher, which are alike; the student's backward pass is
    taken for two more, as is usual (the counter's own figure for it ignores groups, ten times too many for depthwise
    convolutions).
    """
    pretraining.network.train()
    crops, _ = pretraining.prepare_batch(batch, pretraining.device)
    counter = FlopCounterMode(display=False)
    with counter:
        pretraining.network(crops)
    return counter.get_total_flops() * 2
