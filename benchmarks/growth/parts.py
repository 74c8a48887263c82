# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is timed, each in a process of `common.in_bundle`: a dictionary in, the seconds of each run out.

Every task has ``overrides`` of the bundle's configs, ``work`` (a folder for what the runs write) and ``repeats``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bundle_parts import parse

ENOUGH = 30.0  # seconds after which a step is not repeated
Task = dict[str, Any]


def timed(task: Task, ready: Callable[[int], Callable[[], Any]], warmup: int = 0) -> dict[str, list[float]]:
    """Seconds of each run: `ready(number)` makes, untimed, what is then timed."""
    runs: list[float] = []
    for number in range(-warmup, task["repeats"]):
        if sum(runs) > ENOUGH:
            break
        action = ready(number)
        start = time.perf_counter()
        action()
        if number >= 0:
            runs.append(time.perf_counter() - start)
    return {"runs": runs}


def _places(task: Task, number: int) -> dict[str, str]:
    """Where run `number` writes, apart from the others."""
    return {"output_root": str(Path(task["work"]) / f"run{number}"), "cache_dir": str(Path(task["work"]) / "cache")}


def index(task: Task) -> dict[str, list[float]]:
    """Find all series of a tree whose folders nobody has listed before."""
    from workflow.datalist import find_series

    folder, work = task["overrides"]["dataset_dir"], Path(task["work"])
    return timed(task, lambda number: lambda: find_series(folder, cache_dir=work / f"index{number}"))


def index_again(task: Task) -> dict[str, list[float]]:
    """Find them with the index that is there."""
    from workflow.datalist import find_series

    folder, cache = task["overrides"]["dataset_dir"], Path(task["work"]) / "index"
    return timed(task, lambda number: lambda: find_series(folder, cache_dir=cache), warmup=1)


def check(task: Task) -> dict[str, list[float]]:
    """The classifier's check_data.json: headers of all series."""

    def ready(number: int) -> Callable[[], Any]:
        places = _places(task, number)
        Path(places["output_root"]).mkdir(parents=True)
        check = parse(["check_data"], task["overrides"] | places | {"cache_dir": None}).get_parsed_content("check")
        return lambda: check.run(places["output_root"])

    return timed(task, ready)


def prepare(task: Task) -> dict[str, list[float]]:
    """The bundle's prepare.json into an empty cache."""

    def ready(number: int) -> Callable[[], Any]:
        places = _places(task, number)
        shutil.rmtree(places["cache_dir"], ignore_errors=True)
        Path(places["output_root"]).mkdir(parents=True)
        preparation = parse(["train", "prepare"], task["overrides"] | places).get_parsed_content("preparation")

        def action() -> None:
            preparation.run(places["output_root"])
            if preparation.failed:
                raise RuntimeError(f"not prepared: {preparation.failed[:3]}")

        return action

    return timed(task, ready)


def infer(task: Task) -> dict[str, list[float]]:
    """The classifier's inference.json with random weights: from files to predictions.csv."""
    import torch

    weights = str(Path(task["work"]) / "model.pt")

    def ready(number: int) -> Callable[[], Any]:
        places = {"output_root": _places(task, number)["output_root"], "run_name": "inference", "weights": weights}
        parser = parse(["inference"], task["overrides"] | places)
        if not Path(weights).exists():
            torch.save(parser.get_parsed_content("network_def").state_dict(), weights)
        parser.get_parsed_content("run_folder").start()
        return parser.get_parsed_content("evaluator").run

    return timed(task, ready)


def evaluate(task: Task) -> dict[str, list[float]]:
    """The classifier's evaluate.json over prepared volumes, with the intervals and without the report."""
    import torch

    weights = str(Path(task["work"]) / "model.pt")

    def ready(number: int) -> Callable[[], Any]:
        places = _places(task, number) | {"run_name": "evaluation", "weights": weights, "report": False, "part": "all"}
        parser = parse(["train", "evaluate"], task["overrides"] | places)
        if not Path(weights).exists():
            torch.save(parser.get_parsed_content("network_def").state_dict(), weights)
        parser.get_parsed_content("run_folder").start()
        parser.get_parsed_content("validate#dataset").prepare_all()
        return parser.get_parsed_content("validate#evaluator").run

    return timed(task, ready)


def epoch(task: Task) -> dict[str, list[float]]:
    """Epochs of pretraining on prepared volumes, loading included, after a first one."""
    return {"runs": _pretrain(task)["epoch"]}


def step(task: Task) -> dict[str, list[float]]:
    """Steps of pretraining, without loading, after a first epoch."""
    return {"runs": _pretrain(task)["step"]}


def _pretrain(task: Task) -> dict[str, list[float]]:
    from ignite.engine import Events

    epochs = {"max_epochs": task["repeats"] + 1, "val_interval": task["repeats"] + 1, "run_name": "pretraining"}
    parser = parse(["train"], task["overrides"] | _places(task, 0) | epochs)
    parser.get_parsed_content("run_folder").start()
    for name in ("train", "validate"):
        parser.get_parsed_content(f"{name}#dataset").prepare_all()
    trainer = parser.get_parsed_content("train#trainer")
    marks: dict[str, list[float]] = {"epoch": [], "step": []}
    open_since: dict[str, float] = {}

    def begin(name: str) -> None:
        open_since[name] = time.perf_counter()

    def end() -> None:
        now = time.perf_counter()
        if trainer.state.epoch > 1:
            marks["step"].append(now - open_since["step"])
            if trainer.state.iteration % trainer.state.epoch_length == 0:
                marks["epoch"].append(now - open_since["epoch"])

    # the last to be attached: what the run's own handlers do at the start of an epoch or after a step is theirs
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: begin("epoch"))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: begin("step"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    trainer.run()
    return marks


def load(task: Task) -> dict[str, list[float]]:
    """An epoch of the pretraining's loader over prepared volumes; its workers are there already."""
    parser = parse(["train"], task["overrides"] | _places(task, 0))
    parser.get_parsed_content("train#dataset").prepare_all()
    loader = parser.get_parsed_content("train#dataloader")
    return timed(task, lambda number: lambda: sum(1 for _ in loader), warmup=1)


def several(task: Task) -> dict[str, list[list[float]]]:
    """Functions of this module, each with its task, one after the other in this process."""
    runs = []
    for function, own in task["tasks"]:
        Path(own["work"]).mkdir()
        runs.append(globals()[function](own)["runs"])
    return {"runs": runs}
