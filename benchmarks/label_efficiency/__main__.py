# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What pretraining buys on synthetic patients: runs the committed plan in pieces, then reads the test set once.

python -m benchmarks.label_efficiency --work DIR                # resumes; --status shows how far it is
python -m benchmarks.label_efficiency --work DIR --read-test --out benchmarks/results/label_efficiency.json
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

from .plan import WORKER_THREADS, load_plan

MODULE = "benchmarks.label_efficiency"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(MODULE, (__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, help="folder of the study, which it resumes; needed without --smoke")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 works in this one")
    parser.add_argument("--status", action="store_true", help="show validation figures so far and what is left")
    parser.add_argument("--read-test", action="store_true", help="read the test set, once, and write --out")
    parser.add_argument("--without", nargs="+", default=[], metavar="VARIANT",
                        help="with --read-test: variants that are missing and stay so")  # fmt: skip
    found = parser.parse_args(argv)
    if found.work is None and not found.smoke:
        parser.error("--work: expected a folder for the study")
    if found.workers < 1:
        parser.error(f"--workers: expected at least 1, found {found.workers}")
    return found


def run(folder: Path, smoke: bool, workers: int) -> None:
    """Work off the plan, in this process or in several that take tasks from the same folder.

    Raises:
        RuntimeError: a worker failed; the others go on to the end first.
    """
    from .state import Study

    study = Study(folder, load_plan(smoke))
    study.forget_failures()
    if workers == 1:
        from .work import work

        work(study)
        return
    words = [sys.executable, "-m", MODULE, "--work", str(folder), "--workers", "1", *(["--smoke"] if smoke else [])]
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | common.MALLOC | dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(WORKER_THREADS)
    started = [subprocess.Popen(words, cwd=common.ROOT, env=environment) for _ in range(workers)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}: run the same command again once the fault is gone")


def read(folder: Path, smoke: bool, out: Path | None, argv: list[str] | None, without: Sequence[str] = ()) -> None:
    """Read the test set and write the results."""
    from .read_test import read_test
    from .state import Study

    found = common.header(MODULE, argv, smoke) | read_test(Study(folder, load_plan(smoke)), without)
    found["machine"]["threads"] = f"{WORKER_THREADS} in each worker (OMP_NUM_THREADS)"
    common.write(out, found)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = arguments(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    if options.smoke and options.work is None:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), True, 1)
            read(Path(folder), True, options.out, argv)
        return
    folder = options.work.absolute()
    if options.status:
        from .state import Study
        from .status import status

        sys.stdout.write(status(Study(folder, load_plan(options.smoke)), options.workers) + "\n")
    elif options.read_test:
        read(folder, options.smoke, options.out, argv, options.without)
    else:
        run(folder, options.smoke, options.workers)


if __name__ == "__main__":
    main()
