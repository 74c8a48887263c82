# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is measured of the classifier's bundle, each part in a process of its own in the bundle's folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from workflow.cache import SlabCache
from workflow.datalist import find_series
from workflow.dataset import collate_plain

from benchmarks.bundle_parts import parse
from benchmarks.speed.rows import CONTIGUOUS, OURS, STAGES, Measured, measure_parts, timed

# stage of each transform of the bundle's inference; all others are the rest
STAGE_OF = {
    "LoadSeriesd": "decode", "CropSeriesd": "crop to the body", "ScaleIntensityRanged": "window", "Resized": "resize",
}  # fmt: skip
REST, NETWORK = STAGES[-2:]


def _step(task: dict[str, Any], channels_last: bool) -> Callable[[], None]:
    """Forward and backward of one series' slices."""
    parser = parse(["train"], task["overrides"] | {"channels_last": channels_last, "device": "cpu"})
    network = parser.get_parsed_content("network_def").train()
    image = torch.rand(1, 1, *parser["image_size"], parser["num_slices"])

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(image).square().mean().backward()

    return step


def classifier(task: dict[str, Any]) -> Measured:
    """A classifier step in both memory formats."""
    actions = {CONTIGUOUS: _step(task, False), OURS: _step(task, True)}
    return {"classifier": timed(actions, task["repeats"])}


def series(task: dict[str, Any]) -> Measured:
    """A DICOM series to probabilities, uncompressed and compressed; the weights are random."""
    compressed = _stages(task, "rle")["series"]
    return _stages(task, "dicom") | {"series RLE": compressed}


def _stages(task: dict[str, Any], source: str) -> Measured:
    """Seconds of the whole and of each stage."""
    places = {"dataset_dir": task["inputs"][source], "output_root": task["work"], "device": "cpu"}
    parser = parse(["inference"], task["overrides"] | places)
    dataset, network, labels = (parser.get_parsed_content(name) for name in ("dataset", "network", "labels"))
    network.eval()
    found: dict[str, list[float]] = {name: [] for name in ("series", *STAGES)}
    for repeat in range(-1, task["repeats"]):
        seconds = dict.fromkeys(STAGES, 0.0)
        begin = start = time.perf_counter()
        item: Any = dict(dataset.data[0])
        left = set(STAGE_OF)
        for transform in dataset.transform.transforms:
            name = type(transform).__name__
            item = transform(item)
            now = time.perf_counter()
            # the first of its name: a second scaling is of the slices alone
            seconds[STAGE_OF[name] if name in left else REST] += now - start
            left.discard(name)
            start = now
        with torch.inference_mode():
            probabilities = labels.probabilities(network(collate_plain([item])["image"]))
        end = time.perf_counter()
        seconds[NETWORK] = end - start
        if not torch.isfinite(probabilities).all():
            raise ValueError(f"expected probabilities, found {probabilities.tolist()}")
        if repeat >= 0:
            for name, value in {"series": end - begin, **seconds}.items():
                found[name].append(value)
    return {name: {OURS: values} for name, values in found.items()}


def index(task: dict[str, Any]) -> Measured:
    """Listing a tree of series, and preparing one series into an empty cache, without a network."""
    inputs = task["inputs"]
    number = len(find_series(inputs["tree"]))
    listed = timed({OURS: lambda: find_series(inputs["tree"])}, task["repeats"], {OURS: task["calls"]})
    prepare = parse(["train"], task["overrides"]).get_parsed_content("prepare")
    item = find_series(inputs["dicom"])[0]

    def preparation() -> None:
        with tempfile.TemporaryDirectory(dir=task["work"]) as folder:
            SlabCache(prepare, folder).load(item)

    return {
        "index": {OURS: [value / number for value in listed[OURS]]},
        "preparation": timed({OURS: preparation}, task["repeats"]),
    }


ACTIONS = {"classifier": classifier, "series": series, "index": index}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """See `rows.measure_parts`."""
    torch.manual_seed(0)
    return measure_parts(ACTIONS, task)
