# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Pretraining on real CT, measured on the patient left out.

    python -m benchmarks.real_ct --data DIR --work out/real_ct --workers 2 --out out/real_ct.json
    python -m benchmarks.real_ct --smoke --out out/real_ct.json     # small samples in tests/data, a few steps

Three networks with as many seeds each: untrained; pretrained on phantoms; pretrained for as many steps on phantoms and
on three of four real patients, the fourth left out in turn. DIR holds the four series as `data.FULL` names them;
tests/data/README.md cites where they come from. Each training leaves its figures in ``--work``, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import MALLOC, command_line, header, in_bundle, revision, write
from benchmarks.phantoms import make_phantoms
from demo.run import PRETRAIN

from .data import RealData, find_real

MODULE = "benchmarks.real_ct"
# the demo's small backbone and short schedule, with 32 prepared slices and many windows to measure
SETTINGS = {**PRETRAIN, "volume_size": [96, 96, 32], "num_val_crops": 256, "num_workers": 0}
SIZES = {"steps": 180, "phantoms": 60, "probe_phantoms": 30, "phantom_size": 96, "phantom_slices": 32}
SEEDS = 3
SMOKE_SETTINGS = {**SETTINGS, "volume_size": [48, 48, 16], "crop_size": [16, 16], "num_val_crops": 8, "hidden_size": 16}
SMOKE_SIZES = {"steps": 2, "phantoms": 4, "probe_phantoms": 3, "phantom_size": 48, "phantom_slices": 16}
SMOKE_SEEDS = 2
PHANTOM_SEED = 6
WORKER_THREADS = "1"  # of each process that trains


def trainings(patients: list[str], seeds: int) -> list[dict[str, Any]]:
    """Every network to train and measure; ``left_out`` is None where no real series is seen."""
    plan = [("untrained", None), ("phantoms", None), *(("phantoms and patients", patient) for patient in patients)]
    return [
        {"network": network, "seed": seed, "left_out": left_out} for seed in range(seeds) for network, left_out in plan
    ]


def result_file(folder: Path, training: dict[str, Any]) -> Path:
    """Where a training leaves its figures."""
    words = [training["network"].replace(" ", "_"), training["left_out"] or "all", f"seed{training['seed']}"]
    return folder / f"{'-'.join(words)}.json"


def finished(training: dict[str, Any], kind: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of an earlier call with the same settings, sizes and revision; None where there are none."""
    file = Path(training["file"])
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if found is not None and all(found.get(name) == value for name, value in kind.items()) else None


def run(real: RealData, work: Path, kind: dict[str, Any], seeds: int, workers: int) -> list[dict[str, Any]]:
    """The figures of every training; those that `work` holds already are not made again."""
    sizes = kind["sizes"]
    number = sizes["phantoms"] + sizes["probe_phantoms"]
    shape = sizes["phantom_size"], sizes["phantom_slices"]
    phantoms = make_phantoms(work, number, *shape, PHANTOM_SEED, segmentations=True)
    plan = [one | {"file": str(result_file(work, one))} for one in trainings([*real.series], seeds)]
    missing = [one for one in plan if finished(one, kind) is None]
    series = {patient: str(path) for patient, path in real.series.items()}
    places = {"real": series, "mask": str(real.mask), "phantoms": str(phantoms), "cache": str(work / "cache")}
    environment = {**MALLOC, "OMP_NUM_THREADS": WORKER_THREADS, "OMP_WAIT_POLICY": "PASSIVE"}
    shares = [share for k in range(workers) if (share := missing[k::workers])]
    with ThreadPoolExecutor(max(len(shares), 1)) as pool:
        for done in [
            pool.submit(in_bundle, "voco2d_pretrain", "benchmarks.real_ct.parts:run_trainings",
                        {**kind, **places, "trainings": share}, **environment)
            for share in shares
        ]:  # fmt: skip
            done.result()
    stated = ("settings", "sizes")  # once for all; the revision stays with each
    return [{name: value for name, value in (finished(one, kind) or {}).items() if name not in stated} for one in plan]


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = command_line(MODULE, "Pretraining on real CT, measured on the patient left out.")
    parser.add_argument("--data", type=Path, help="folder of the four real series; not with --smoke")
    parser.add_argument("--work", type=Path, help="folder of what an interrupted run goes on with; not with --smoke")
    parser.add_argument("--seeds", type=int, help=f"of each network (default {SEEDS})")
    parser.add_argument("--steps", type=int, help=f"of each training (default {SIZES['steps']})")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and (arguments.data is None or arguments.work is None):
        parser.error("expected --data and --work (or --smoke)")
    found = header(MODULE, argv, arguments.smoke) | measure(arguments, parser)
    found["machine"]["threads"] = f"{WORKER_THREADS} in each of {arguments.workers} processes"
    write(arguments.out, found)


def measure(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the command line asks for: settings, sizes and the figures of every training."""
    smoke = arguments.smoke
    sizes = dict(SMOKE_SIZES if smoke else SIZES)
    if arguments.steps is not None:
        sizes["steps"] = arguments.steps
    kind = {"settings": SMOKE_SETTINGS if smoke else SETTINGS, "sizes": sizes, "revision": revision()}
    seeds = arguments.seeds or (SMOKE_SEEDS if smoke else SEEDS)
    try:
        real = find_real(None if smoke else arguments.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory())) if smoke else arguments.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        return {**kind, "seeds": seeds, "trainings": run(real, work, kind, seeds, arguments.workers)}


if __name__ == "__main__":
    sys.exit(main())
