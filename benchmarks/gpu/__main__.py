# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed on a GPU: precision, memory format, compilation, where crops are cut, and what the loader costs.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json
    python -m benchmarks.gpu --smoke --device cpu    # only shows that it works

Training steps are those of the bundles' own trainers at the configs' sizes (the batch size is an option), on synthetic
series; what is compared takes turns in one process. Times are up to a synchronisation with the device.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line, header, in_bundle, write
from benchmarks.growth.trees import write_long, write_tree

from .parts import DEFAULT, EAGER, FASTEST, VARIANTS

MODULE = "benchmarks.gpu"
VOCO, RSNA = "voco2d_pretrain", "rsna_cnn_lstm"
FULL: dict[str, Any] = {
    "batch_size": 16, "steps": 10, "repeats": 5, "volumes": 64, "epoch_volumes": 512, "workers": 8, "slices": 300,
    "size": 512, "matrix": 8192, "classifier_batch_size": 8,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "batch_size": 2, "steps": 1, "repeats": 1, "volumes": 6, "epoch_volumes": 6, "workers": 0, "slices": 16,
    "size": 64, "matrix": 128, "classifier_batch_size": 2,
}  # fmt: skip
MEANING = {
    "batch_size": "volumes of a pretraining step",
    "steps": "training steps of one timing",
    "repeats": "timings of each variant, in turns",
    "volumes": "synthetic series that are prepared",
    "epoch_volumes": "volumes of an epoch of the loader's part, those repeated",
    "workers": "processes of the loader",
    "slices": "slices of the series of the inference",
    "size": "its rows and columns",
    "matrix": "rows and columns of the products that measure the device's peak",
    "classifier_batch_size": "volumes of a classifier step",
}
TINY = (32, 8)  # rows and columns, mean number of slices of the series that training steps are measured on
SMALL_VOCO = {
    "backbone_name": "test_efficientnet", "hidden_size": 64, "volume_size": [48, 48, 16], "crop_size": [16, 16],
    "num_slices": 8,
}  # fmt: skip
SMALL_RSNA = {
    "backbone_name": "test_efficientnet", "hidden_size": 16, "volume_size": [48, 48, 16], "image_size": [32, 32],
    "num_slices": 8,
}  # fmt: skip

logger = logging.getLogger(MODULE)


def measure(options: dict[str, Any], device: str, smoke: bool, work: Path) -> Iterator[dict[str, Any]]:
    """Part after part, each in a process of its own."""
    tree = write_tree(work / "tree", options["volumes"], *TINY)
    common = {"device": device, "num_workers": options["workers"], "output_root": str(work / "out")}
    trained = common | {"dataset_dir": str(tree), "seed": 0}
    voco = trained | (SMALL_VOCO if smoke else {}) | {"batch_size": options["batch_size"], "val_fraction": 0.1}
    rsna = trained | (SMALL_RSNA if smoke else {}) | {"batch_size": options["classifier_batch_size"]}
    timing = {name: options[name] for name in ("steps", "repeats")}
    series = write_long(work / "series", options["slices"], options["size"])
    inference = common | (SMALL_RSNA if smoke else {}) | {"dataset_dir": str(series), "num_workers": 0}
    tasks = {
        "peaks": (VOCO, "peaks", {"device": device, "matrix": options["matrix"], "repeats": options["repeats"]}),
        "pretraining": (VOCO, "steps", timing | {"overrides": voco, "variants": list(VARIANTS)}),
        "loader": (VOCO, "stall", timing | {"overrides": voco, "epoch_volumes": options["epoch_volumes"]}),
        "classifier": (RSNA, "steps", timing | {"overrides": rsna, "variants": [EAGER, FASTEST, DEFAULT]}),
        "inference": (RSNA, "infer", timing | {"overrides": inference}),
    }
    if not smoke:
        for name, (bundle, function, task) in tasks.items():
            yield {name: in_bundle(bundle, f"{MODULE}.parts:{function}", task)}
            logger.info("%s: done", name)
        return
    for bundle in (VOCO, RSNA):  # one process a bundle: imports would take nearly all of a smoke run
        own = {name: (function, task) for name, (owner, function, task) in tasks.items() if owner == bundle}
        yield in_bundle(bundle, f"{MODULE}.parts:several", {"tasks": own})["found"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = command_line(MODULE, "Speed on a GPU: precision, memory format, compilation, crops, loader.")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1; cpu with --smoke only")
    for name, value in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{MEANING[name]}; default {value}")
    arguments = parser.parse_args(argv)
    on_gpu = torch.device(arguments.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device found; without one there is only --smoke --device cpu, which measures nothing")
    if not on_gpu and not arguments.smoke:
        parser.error(f"--device {arguments.device}: expected a CUDA device; on a CPU there is only --smoke")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    given = {name: value for name, value in vars(arguments).items() if name in FULL and value is not None}
    options = (SMOKE if arguments.smoke else FULL) | given
    results = header(MODULE, argv, arguments.smoke) | {"device": arguments.device, "options": options}
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(options, arguments.device, arguments.smoke, Path(folder)):
            results |= found
            write(arguments.out, results)  # what a later part that fails leaves


if __name__ == "__main__":
    main()
