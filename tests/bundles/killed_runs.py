# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a bundle once without and once with interruptions by ``kill -9``, each followed by ``resume=latest``: run by
test_kills.py as `python -c`, with the bundle's folder as working directory. Libraries are imported once and each run is
a fork, so that a kill is cheap.

Argument: a JSON object with `arguments` of the training, `kills`, `seed`, `out`. Prints what was done as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas  # noqa: F401
import timm  # noqa: F401
import torch
import torch.utils.tensorboard
import workflow.checkpoint
import workflow.dataset
import workflow.run
from monai.bundle import run

KINDS = ("startup", "training", "training", "half written", "before its name", "before the old is removed")
STEPS = 2  # of a run at most before it is killed: a fast machine would come to the end before the last kill otherwise


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(kind: str, calls: int) -> None:
    """Kill this process at the given call, within the writing of a checkpoint or of model.pt."""
    left = [calls]
    save, replace, unlink = torch.save, os.replace, Path.unlink

    def due(path: object) -> bool:
        left[0] -= ".pt" in str(path)
        return left[0] < 1

    def half(content: Any, file: Any, **options: Any) -> None:
        whole = BytesIO()
        save(content, whole, **options)
        if due(file.name):
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        file.write(whole.getvalue())

    def before(source: object, target: object) -> None:
        if due(target):
            die()
        replace(source, target)

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pt" and due(path):
            die()
        unlink(path, missing_ok=missing_ok)

    if kind == "half written":
        workflow.checkpoint.torch.save = half
    elif kind == "before its name":
        os.replace = before
    else:
        Path.unlink = keep


def start(arguments: dict[str, Any], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """The process of a run of its own."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        run(config_file="configs/train.json", **arguments)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork must not return into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """Status of a process when it has ended; None if `until` came first."""
    while not until():
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def newest(folder: Path) -> int:
    return max((number for number, _ in workflow.checkpoint.numbered(folder / "checkpoints")), default=-1)


def interrupt(arguments: dict[str, Any], folder: Path, kind: str, span: float, draw: random.Random) -> dict[str, Any]:
    """Start or go on with a run and kill it; how it ended."""
    if folder.is_dir() and any(folder.iterdir()):
        arguments = {**arguments, "resume": "latest"}
    before, log = newest(folder), folder.parent / "killed.txt"
    moment = 0.0
    if kind in ("startup", "training"):
        pid = start(arguments, log)
        if kind == "training" and (status := ended(pid, lambda: newest(folder) > before)) is not None:
            return {"kind": kind, "status": status}
        moment = draw.uniform(0, span if kind == "startup" else span / 10)
        deadline = time.monotonic() + moment
        status = ended(pid, lambda: time.monotonic() > deadline or newest(folder) >= max(before, 0) + STEPS)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = ended(pid)
    else:
        calls = draw.randint(1, 3)
        status = ended(start(arguments, log, lambda: set_trap(kind, calls)))
    return {"kind": kind, "moment": round(moment, 3), "status": status, "before": before, "after": newest(folder)}


def main() -> None:
    options = json.loads(sys.argv[1])
    arguments, out, draw = options["arguments"], Path(options["out"]), random.Random(options["seed"])
    begun = time.monotonic()
    status = ended(start({**arguments, "run_name": "whole"}, out / "whole.txt"))
    if status:
        sys.exit((out / "whole.txt").read_text()[-3000:])
    span = time.monotonic() - begun
    kinds = [KINDS[i % len(KINDS)] for i in range(options["kills"])]
    draw.shuffle(kinds)
    killed = {**arguments, "run_name": "killed"}
    kills = [interrupt(killed, out / "killed", kind, span / 2, draw) for kind in kinds]
    status = ended(start({**killed, "resume": "latest"}, out / "killed.txt"))
    again = ended(start({**killed, "resume": "latest"}, out / "again.txt"))
    sys.stdout.write(json.dumps({"kills": kills, "status": status, "again": again}) + "\n")


if __name__ == "__main__":
    main()
