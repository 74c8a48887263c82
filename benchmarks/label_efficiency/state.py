# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a study: what is done, who works on what. A process may be killed at any time: only what it was just
doing is lost, and several may work in one folder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .plan import Plan, Task, tasks

POLL_SECONDS = 2.0


class Study:
    """A study's folder.

    Args:
        folder: made if absent.
        plan: must be the one the folder was begun with.

    Raises:
        ValueError: the folder was begun with another plan.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.runs, self.weights, self.data = folder / "runs", folder / "weights", folder / "data"
        for path in (self.runs, self.weights, self.data, folder / "locks"):
            path.mkdir(parents=True, exist_ok=True)
        kept = folder / "plan.json"
        if not kept.is_file():
            self._write(kept, plan)
        elif json.loads(kept.read_text(encoding="utf-8")) != plan:
            raise ValueError(f"{kept}: the folder was begun with another plan; expected benchmarks/label_efficiency's")

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    def done(self, name: str) -> bool:
        """Whether this piece's result is there."""
        return (self.runs / f"{name}.json").is_file()

    def result(self, name: str) -> dict[str, Any]:
        """What was recorded of a piece."""
        return json.loads((self.runs / f"{name}.json").read_text(encoding="utf-8"))

    def record(self, name: str, result: dict[str, Any], **arrays: np.ndarray) -> None:
        """Keep a piece's result; its arrays first, so that what has a result is whole."""
        if arrays:
            temporary = self.runs / f"{name}.{os.getpid()}.tmp"
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(temporary, self.runs / f"{name}.npz")
        self._write(self.runs / f"{name}.json", result)

    def fail(self, task: Task, reason: str) -> None:
        """Keep why a piece could not be done, as ``runs/<name>.failed``."""
        self._write(self.runs / f"{task.names[0]}.failed", {"reason": reason})

    def failed(self, task: Task) -> bool:
        """Whether it was tried in vain."""
        return (self.runs / f"{task.names[0]}.failed").is_file()

    def failures(self) -> dict[str, str]:
        """Why, by name of the piece."""
        files = sorted(self.runs.glob("*.failed"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8"))["reason"] for file in files}

    def forget_failures(self) -> None:
        """So that they are tried again."""
        for file in self.runs.glob("*.failed"):
            file.unlink(missing_ok=True)

    def predictions(self, name: str, split: str) -> np.ndarray:
        """[N, P] probabilities of a run."""
        with np.load(self.runs / f"{name}.npz") as arrays:
            return arrays[split].astype(np.float64)

    @property
    def test_was_read(self) -> bool:
        """Whether anyone has looked at the test set."""
        return (self.folder / "test.json").is_file()

    def result_of_test(self) -> dict[str, Any]:
        """What was read off it."""
        return json.loads((self.folder / "test.json").read_text(encoding="utf-8"))

    def record_test(self, content: dict[str, Any]) -> None:
        """Keep what was read off the test set."""
        self._write(self.folder / "test.json", content)

    def open_tasks(self) -> list[Task]:
        """What is left, in order."""
        return [task for task in tasks(self.plan) if not all(map(self.done, task.names))]

    def possible_tasks(self) -> list[Task]:
        """What is left, less what failed and what needs it, in order."""
        hopeless = {*self.failures()}
        found = []
        for task in self.open_tasks():  # a task comes after what it needs
            if task.names[0] in hopeless or any(need in hopeless for need in task.needs):
                hopeless |= {*task.names}
            else:
                found.append(task)
        return found

    @contextmanager
    def claim(self, task: Task) -> Iterator[bool]:
        """Whether this process has the task to itself; the system lets go of it when the process ends."""
        with (self.folder / "locks" / task.names[0]).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not all(map(self.done, task.names))

    def next_tasks(self) -> Iterator[Task]:
        """Tasks for this process, each claimed while it is worked on, until none is left that can be done.

        Raises:
            RuntimeError: the test set was read: nothing may be trained after that; or, at the end, pieces failed.
        """
        while left := self.possible_tasks():
            if self.test_was_read:
                raise RuntimeError(f"{self.folder}: the test set was read, so no more runs may be added")
            worked = False
            for task in left:
                if not all(map(self.done, task.needs)):
                    continue
                with self.claim(task) as mine:
                    if mine and not self.failed(task):  # another process may just have failed at it
                        yield task
                        worked = True
                if worked:
                    break
            if not worked:
                time.sleep(POLL_SECONDS)
        if failed := self.failures():
            raise RuntimeError(f"{', '.join(failed)} failed (see {self.runs}/*.failed); the rest that can be is done")
