# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed of the bundles' own parts beside the original's structure and MONAI's caches; targets with reached or missed.

    python -m benchmarks.speed --out benchmarks/results/speed.json   # about 9 minutes on two quiet cores
    python -m benchmarks.speed --only step --repeats 3               # one part, to the screen

Each part runs in a process of its own, with the bundle's own config at its default sizes; what is compared takes turns
within that process. The peak memory of a step is that of a process of its own for each variant. All processes have the
same threads, and those that compare have the same settings of glibc's malloc; seconds that are compared with nothing
are under its default, as a user's run is.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import MALLOC, command_line, header, in_bundle, write
from .inputs import SMOKE, Sizes, make
from .report import as_text
from .rows import ORIGINAL, OURS, PARTS, WITH_GRADIENT, Measured, rows

REPEATS = 5
CALLS = 20  # timed together, of what takes milliseconds or less
ABSOLUTE = ("series", "index")  # parts whose seconds are compared with nothing
CLASSIFIER_PARTS = ("classifier", "series", "index")
SMALL = {"backbone_name": "test_efficientnet", "num_slices": 4}
SMALL_PRETRAINING = SMALL | {"volume_size": [48, 48, 16], "crop_size": [16, 16], "hidden_size": 16, "num_workers": 1}
SMALL_CLASSIFIER = SMALL | {"volume_size": [48, 48, 16], "image_size": [32, 32]}
BUNDLES = {"voco2d_pretrain": ("pretraining", SMALL_PRETRAINING), "rsna_cnn_lstm": ("classifier", SMALL_CLASSIFIER)}
STEPS = (ORIGINAL, WITH_GRADIENT, OURS)

logger = logging.getLogger("benchmarks.speed")


def _processes(parts: list[str], smoke: bool) -> list[tuple[str, list[str], list[str]]]:
    """(bundle, parts, variants whose memory counts) of each process: one a part or variant, one a bundle if `smoke`."""
    classifier = [part for part in parts if part in CLASSIFIER_PARTS]
    pretraining = [part for part in parts if part not in CLASSIFIER_PARTS]
    if smoke:
        groups = [("voco2d_pretrain", pretraining, list(STEPS)), ("rsna_cnn_lstm", classifier, [])]
        return [group for group in groups if group[1]]
    timed = [("voco2d_pretrain", [part], []) for part in pretraining if part != "memory"]
    peaks = [("voco2d_pretrain", ["memory"], [step]) for step in STEPS if "memory" in parts]
    return [*timed, *peaks, *(("rsna_cnn_lstm", [part], []) for part in classifier)]


def allocator(parts: Sequence[str]) -> dict[str, str]:
    """Environment of a process that measures these parts."""
    return MALLOC if set(parts) - set(ABSOLUTE) else {}


def measure(parts: list[str], repeats: int, smoke: bool) -> dict[str, Any]:
    """Rows of the parts, and what they were measured on."""
    measured: Measured = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = make(Path(folder), SMOKE if smoke else Sizes())
        for bundle, named, variants in _processes(parts, smoke):
            logger.info("%s: %s", bundle, ", ".join([*named, *variants]))
            module, small = BUNDLES[bundle]
            task = {"parts": named, "variants": variants, "inputs": inputs, "work": folder, "repeats": repeats,
                    "calls": 2 if smoke else CALLS, "overrides": small if smoke else {}}  # fmt: skip
            found = in_bundle(bundle, f"benchmarks.speed.{module}:measure", task, **allocator(named))
            measured |= found["measured"]
            if "memory" in named:
                measured.setdefault("memory", {}).update({name: [found["peak_mb"]] for name in variants})
    return {"repeats": repeats, "malloc": MALLOC, "inputs": inputs["sizes"], "rows": rows(measured)}


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = command_line("benchmarks.speed", "Speed beside the original's structure and MONAI's caches.")
    parser.add_argument("--only", choices=PARTS, help="this part alone, to the screen")
    parser.add_argument("--repeats", type=int, default=None, help=f"of each measurement (default {REPEATS}; smoke: 2)")
    arguments = parser.parse_args(argv)
    if arguments.only and arguments.out:
        parser.error("--only: a document needs all parts, so it does not go with --out")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats: expected at least 1, found {arguments.repeats}")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    repeats = arguments.repeats or (2 if arguments.smoke else REPEATS)
    parts = [arguments.only] if arguments.only else list(PARTS)
    results = header("benchmarks.speed", argv, arguments.smoke) | measure(parts, repeats, arguments.smoke)
    sys.stdout.write(as_text(results["rows"]) + "\n")
    write(arguments.out, results)


if __name__ == "__main__":
    main()
