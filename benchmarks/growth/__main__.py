# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with slices, series, volumes, batch size and workers.

    python -m benchmarks.growth --out benchmarks/results/growth.json
    python -m benchmarks.growth --only series --out benchmarks/results/growth.json    # one part into what is there

Synthetic series (the demo's generator). Each point is measured in a process of its own, so that its peak memory
is its own; times are without imports, in one process without workers except in the part "workers", with
files in the page cache. A step that takes long is not repeated (`parts.ENOUGH`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, header, in_bundle, spread, write

from .trees import check_divisors, every_nth, write_long, write_tree

MODULE = "benchmarks.growth"
VOCO, RSNA = "voco2d_pretrain", "rsna_cnn_lstm"
FULL = {
    "slices": [50, 100, 300, 600, 1200],
    "series": [50, 500, 5000],
    "volumes": [50, 200, 800],
    "batch": [1, 2, 4, 8],
    "workers": [0, 1, 2, 4],
    "repeats": 3,
    "long_size": 512,  # rows and columns of the part slices
    "batch_volumes": 16,
    "worker_volumes": 100,
    "small": False,  # volumes and networks of the parts slices, batch and workers
}
SMOKE = {
    "slices": [8, 16],
    "series": [4, 8],
    "volumes": [6, 8],  # not fewer than folds
    "batch": [1, 2],
    "workers": [0, 1],
    "repeats": 1,
    "long_size": 64,
    "batch_volumes": 2,
    "worker_volumes": 2,
    "small": True,
}
TINY = (32, 8)  # rows and columns, mean number of slices of the series that are counted and not looked at
PLAIN = {"device": "cpu", "seed": 0, "num_workers": 0}
SMALL_VOCO = {
    "backbone_name": "test_efficientnet", "hidden_size": 64, "volume_size": [48, 48, 16], "crop_size": [16, 16],
    "num_slices": 8, "num_val_crops": 2, "batch_size": 4,
}  # fmt: skip
# one pretraining step of the part batch: larger, so that arithmetic and not the calls decide
STEP_VOCO = SMALL_VOCO | {"hidden_size": 256, "volume_size": [96, 96, 32], "crop_size": [32, 32], "num_slices": 16}
SMALL_RSNA = {
    "backbone_name": "test_efficientnet", "hidden_size": 16, "volume_size": [48, 48, 16], "image_size": [32, 32],
    "num_slices": 8,
}  # fmt: skip
SMALL_PREPARED = {"volume_size": [48, 48, 16]}

logger = logging.getLogger(MODULE)
Options = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What one row of the results is measured by: a function of `parts` with overrides of a bundle's configs."""

    part: str
    x: int
    step: str
    bundle: str
    function: str
    repeats: int
    overrides: dict[str, Any]


def measure(point: Point, work: Path) -> Row:
    """One row of the results, measured in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        task = {"repeats": point.repeats, "overrides": point.overrides, "work": folder}
        found = in_bundle(point.bundle, f"{MODULE}.parts:{point.function}", task)
    logger.info(
        "%s %d, %s: %.3f s, %.0f MB",
        point.part, point.x, point.step, spread(found["runs"])["median"], found["peak_mb"],
    )  # fmt: skip
    return row(point, found["runs"], found["peak_mb"])


def row(point: Point, runs: list[float], peak_mb: float) -> Row:
    """A point's line of the results."""
    name = {"part": point.part, "x": point.x, "step": point.step}
    return name | {"seconds": spread(runs), "runs": runs, "peak_mb": spread([peak_mb])}


def measure_together(points: Sequence[Point], work: Path) -> list[Row]:
    """Rows of all points with one process a bundle: in a smoke run the imports would take nearly all of the time. The
    peak memory is then the process' and not the point's."""
    rows: dict[int, Row] = {}
    for bundle in dict.fromkeys(point.bundle for point in points):
        own = [point for point in points if point.bundle == bundle]
        tasks = [
            (
                point.function,
                {"repeats": point.repeats, "overrides": point.overrides, "work": str(work / f"{bundle}{k}")},
            )
            for k, point in enumerate(own)
        ]
        found = in_bundle(bundle, f"{MODULE}.parts:several", {"tasks": tasks})
        rows |= {id(point): row(point, runs, found["peak_mb"]) for point, runs in zip(own, found["runs"], strict=True)}
    return [rows[id(point)] for point in points]


def slices(options: Options, work: Path) -> Iterator[Point]:
    """A DICOM series to probabilities, and its preparation for pretraining, both at the configs' own sizes."""
    longest = write_long(work / "longest", max(options["slices"]), options["long_size"])
    classifier = PLAIN | (SMALL_RSNA if options["small"] else {})
    pretraining = {"num_workers": 0, **(SMALL_PREPARED if options["small"] else {})}
    for x in options["slices"]:
        place = {"dataset_dir": str(every_nth(longest, work / str(x) / "series", x))}
        yield Point("slices", x, "inference", RSNA, "infer", options["repeats"], classifier | place)
        yield Point("slices", x, "preparation", VOCO, "prepare", options["repeats"], pretraining | place)


def series(options: Options, work: Path) -> Iterator[Point]:
    """Index, check and preparation of an RSNA tree."""
    sizes = {name: value for name, value in SMALL_RSNA.items() if name != "image_size"}
    steps = {
        "index": ("index", {}),
        "index again": ("index_again", {}),
        "check": ("check", {"num_workers": 0}),
        "preparation": ("prepare", PLAIN | sizes),
    }
    for x in options["series"]:
        place = {"dataset_dir": str(write_tree(work / f"series{x}", x, *TINY))}
        for step, (function, overrides) in steps.items():
            yield Point("series", x, step, RSNA, function, options["repeats"], overrides | place)


def volumes(options: Options, work: Path) -> Iterator[Point]:
    """An evaluation of the classifier over prepared volumes, and an epoch of pretraining."""
    for x in options["volumes"]:
        place = {"dataset_dir": str(write_tree(work / f"volumes{x}", x, *TINY))}
        evaluation = PLAIN | SMALL_RSNA | {"batch_size": 8} | place
        yield Point("volumes", x, "evaluation", RSNA, "evaluate", options["repeats"], evaluation)
        yield Point("volumes", x, "pretraining", VOCO, "epoch", options["repeats"], PLAIN | SMALL_VOCO | place)


def batch(options: Options, work: Path) -> Iterator[Point]:
    """A pretraining step by batch size."""
    number = options["batch_volumes"] + 1  # one is held out: all batches are whole
    tree = write_tree(work / "batch", number, *TINY)
    for x in options["batch"]:
        network = SMALL_VOCO if options["small"] else STEP_VOCO
        overrides = PLAIN | network | {"val_fraction": 1 / number, "batch_size": x, "dataset_dir": str(tree)}
        yield Point("batch", x, "pretraining step", VOCO, "step", options["repeats"], overrides)


def workers(options: Options, work: Path) -> Iterator[Point]:
    """An epoch of pretraining's loader over prepared volumes of the config's own sizes, and preparing them."""
    tree = write_tree(work / "workers", options["worker_volumes"], *TINY)
    small = SMALL_PREPARED | {"crop_size": SMALL_VOCO["crop_size"]} if options["small"] else {}
    for x in options["workers"]:
        for step, function in (("loader", "load"), ("preparation", "prepare")):
            overrides = {"device": "cpu", "num_workers": x, "dataset_dir": str(tree), **small}
            yield Point("workers", x, step, VOCO, function, options["repeats"], overrides)


PARTS: dict[str, Callable[[Options, Path], Iterator[Point]]] = {
    "slices": slices, "series": series, "volumes": volumes, "batch": batch, "workers": workers,
}  # fmt: skip


def begin(out: Path | None, only: str | None, head: dict[str, Any]) -> dict[str, Any]:
    """The results to add to: those of `out` where a single part is measured anew, else none.

    Raises:
        ValueError: if those of `out` are of another machine or revision.
    """
    fresh = head | {"sizes": {}, "rows": []}
    if only is None or out is None or not out.is_file():
        return fresh
    known = json.loads(out.read_text(encoding="utf-8"))
    for name in ("revision", "machine", "smoke"):
        if known.get(name) != head[name]:
            raise ValueError(
                f"{out}: its {name} is {known.get(name)}, this one is {head[name]}: figures of one file are of one "
                "machine and revision; give another --out, or measure all parts anew without --only"
            )
    commands = known["command"].split(" && ")
    return known | {"command": " && ".join([*commands, *([head["command"]] * (head["command"] not in commands))])}


def numbers(text: str) -> list[int]:
    """``1,2,4`` as a list, at least two different."""
    found = sorted({int(word) for word in text.split(",")})
    if len(found) < 2 or found[0] < 0:
        raise argparse.ArgumentTypeError(f"expected at least two different numbers, found {text!r}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = command_line(MODULE, "How time and memory grow with slices, series, volumes, batch size and workers.")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone and add it to what --out holds")
    for name in PARTS:
        parser.add_argument(f"--{name}", type=numbers, help=f"default {','.join(map(str, FULL[name]))}")
    for name in ("repeats", "long_size", "batch_volumes", "worker_volumes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {FULL[name]}")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    given = {name: value for name, value in vars(arguments).items() if name in FULL and value is not None}
    options = (SMOKE if arguments.smoke else FULL) | given
    try:
        check_divisors(options["slices"])
        results = begin(arguments.out, arguments.only, header(MODULE, argv, arguments.smoke))
    except ValueError as error:
        parser.error(str(error))
    chosen = [arguments.only] if arguments.only else list(PARTS)
    for names in [chosen] if arguments.smoke else [[part] for part in chosen]:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            points = (point for name in names for point in PARTS[name](options, work))
            rows = measure_together(list(points), work) if arguments.smoke else [measure(p, work) for p in points]
        results["rows"] = [row for row in results["rows"] if row["part"] not in names] + rows
        results["sizes"] |= dict.fromkeys(names, options)
        write(arguments.out, results)


if __name__ == "__main__":
    main()
