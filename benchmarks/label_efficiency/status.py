# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a study has found on validation so far, and how much is left. The test set is not touched."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.common import table

from .plan import Task, tasks
from .state import Study


def status(study: Study, workers: int) -> str:
    """Two Markdown tables and a line."""
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    spent: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    health: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task in tasks(study.plan):
        for name in filter(study.done, task.names):
            result = study.result(name)
            spent[_cost_key(task)].append(result["seconds"])
            if task.kind == "fine_tune":
                values[task.level, task.mode, str(result["rate"]), task.pretext].append(result["validation"]["mAP"])
            if task.kind == "pretrain":
                health[task.pretext].append(result["health"])
    rows = [
        (*key, f"{np.mean(found):.3f}", ", ".join(f"{value:.3f}" for value in found))
        for key, found in sorted(values.items())
    ]
    figures = sorted({key for found in health.values() for key in found[0]})
    health_rows = [
        (name, len(found), *(f"{np.mean([one[key] for one in found]):.3f}" for key in figures))
        for name, found in health.items()
    ]
    left = study.open_tasks()
    known = [np.mean(times) for times in spent.values()]
    seconds = sum(len(task.names) * float(np.mean(spent.get(_cost_key(task)) or known or [0.0])) for task in left)
    total = sum(len(task.names) for task in tasks(study.plan))
    done, minutes = total - sum(len(task.names) for task in left), seconds / workers / 60
    summary = f"{done} of {total} pieces done, about {minutes:.0f} minutes left"
    failed = [f"failed: {name}: {reason.strip().splitlines()[-1]}" for name, reason in study.failures().items()]
    return "\n\n".join([
        table(("level", "mode", "labels in %", "pretext", "validation mAP", "by seed"), rows),
        table(("pretext", "seeds", *figures), health_rows),
        summary,
        *failed,
    ])  # fmt: skip


def _cost_key(task: Task) -> tuple[Any, ...]:
    return (task.kind, task.split, task.mode, task.rates if task.mode != "frozen" else ())
