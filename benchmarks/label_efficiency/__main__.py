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
from pathlib import Path

from benchmarks import common

from .plan import load_plan

MODULE = "benchmarks.label_efficiency"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(MODULE, (__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, help="folder of the study, which it resumes; needed without --smoke")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 works in this one")
    parser.add_argument("--status", action="store_true", help="show validation figures so far and what is left")
    parser.add_argument("--read-test", action="store_true", help="read the test set, once, and write --out")
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
    if workers == 1:
        from .state import Study
        from .work import work

        work(Study(folder, load_plan(smoke)))
        return
    words = [sys.executable, "-m", MODULE, "--work", str(folder), "--workers", "1", *(["--smoke"] if smoke else [])]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | common.MALLOC | dict(os.environ)
    started = [subprocess.Popen(words, cwd=common.ROOT, env=environment) for _ in range(workers)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}: run the same command again once the fault is gone")


def read(folder: Path, smoke: bool, out: Path | None, argv: list[str] | None) -> None:
    """Read the test set and write the results."""
    from .read_test import read_test
    from .state import Study

    found = read_test(Study(folder, load_plan(smoke)))
    common.write(out, common.header(MODULE, argv, smoke) | found)


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
        read(folder, options.smoke, options.out, argv)
    else:
        run(folder, options.smoke, options.workers)


if __name__ == "__main__":
    main()
