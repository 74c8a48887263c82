# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The one look at the test set: figures of all stored predictions, and the comparisons of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.windows import position_baselines

from . import figures
from .data import load_patients
from .health import window_overlaps
from .plan import FIRST_LEVEL, Plan, run_name, tasks
from .pretexts import CONTROL
from .state import Study
from .work import label_table

REFERENCE = "v2"  # what variants are compared with


def missing_pieces(study: Study, without: Sequence[str] = ()) -> list[str]:
    """Planned pieces that are not there yet, less those of the variants left out."""
    left = [task for task in study.open_tasks() if task.pretext not in without]
    return [name for task in left for name in task.names if not study.done(name)]


def check_left_out(study: Study, without: Sequence[str]) -> None:
    """Only a variant whose runs are not all there can be left out: none is dropped for what it found.

    Raises:
        ValueError: for any other name.
    """
    incomplete = {task.pretext for task in study.open_tasks()} & {*study.plan["variants"]}
    if not {*without} <= incomplete:
        raise ValueError(f"--without: expected variants with missing runs ({sorted(incomplete)}), found {[*without]}")


def read_test(study: Study, without: Sequence[str] = ()) -> dict[str, Any]:
    """All that the report shows; the second time it is what the first one found.

    Args:
        without: variants to leave out, which must be incomplete; the report names them.

    Raises:
        RuntimeError: planned runs are missing: nobody looks at the test set before they are there.
    """
    if study.test_was_read:
        return study.result_of_test()
    check_left_out(study, without)
    missing = missing_pieces(study, without)
    if missing:
        raise RuntimeError(f"{len(missing)} planned runs are missing, such as {missing[0]}: the test set stays unread")
    plan = study.plan
    runs = [run for run in _runs(study) if run["pretext"] not in without]
    kept = [study.result(name) for task in tasks(plan) for name in task.names if study.done(name)]
    content = {
        "plan": plan,
        "runs": runs,
        "frequencies": {level: _frequencies(study, level) for level in plan["levels"]},
        "comparisons": compare(study, runs),
        "health": {name: found for name, found in _health(study).items() if name not in without},
        "position_baselines": position_baselines(window_overlaps(plan)),
        "core_seconds": sum(one["core_seconds"] for one in kept),
        "revisions": dict(Counter(one["revision"] for one in kept)),
        "without": [*without],
    }
    study.record_test(content)
    return content


def _classes(study: Study, level: str) -> np.ndarray:
    return load_patients(study.data, level, "test").classes


def _frequencies(study: Study, level: str) -> dict[str, Any]:
    return figures.frequency_figures(label_table(), _classes(study, level))


def _runs(study: Study) -> list[dict[str, Any]]:
    """Each finished fine-tuning with its test and validation figures."""
    found = []
    classes = {level: _classes(study, level) for level in study.plan["levels"]}
    for task in tasks(study.plan):
        for name in task.names if task.kind == "fine_tune" else ():
            if study.done(name):
                kept = study.result(name)
                test = figures.point_figures(label_table(), classes[task.level], study.predictions(name, "test"))
                keys = ("level", "pretext", "seed", "mode", "rate", "labels", "validation", "core_seconds", "revision")
                found.append({"name": name, **{key: kept.get(key, 0) for key in keys}, "test": test})
    return found


def planned_pairs(plan: Plan) -> list[dict[str, Any]]:
    """Every comparison of the plan: at which level, mode and rate, which pretext with which."""
    found = []
    pretexts = [name for name in plan["pretexts"] if name != "scratch"]
    for level, modes in plan["grid"].items():
        for mode, rates in modes.items():
            for rate in rates:
                where = {"level": level, "mode": mode, "rate": rate}
                found += [{**where, "one": name, "two": "scratch"} for name in pretexts]
                found += [{**where, "one": name, "two": CONTROL} for name in pretexts if name != CONTROL]
    for variant in plan["variants"]:
        for rate in plan["variant_rates"]:
            where = {"level": FIRST_LEVEL, "mode": "full", "rate": rate}
            found += [{**where, "one": variant, "two": REFERENCE}]
    return found


def compare(study: Study, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planned comparisons of what is there: differences in mAP and score, paired by seed and by patient."""
    by_name = {run["name"]: run for run in runs}
    plan, found = study.plan, []
    for pair in planned_pairs(plan):
        where = (pair["mode"], pair["rate"])
        names = [
            [run_name(pair["level"], pair[side], seed, *where) for seed in plan["seeds"]] for side in ("one", "two")
        ]
        if all(name in by_name for side in names for name in side):
            found.append({**pair, "names": names})
    for level in plan["levels"]:
        own = [pair for pair in found if pair["level"] == level]
        wanted = sorted({name for pair in own for side in pair["names"] for name in side})
        predictions = {name: study.predictions(name, "test") for name in wanted}
        intervals = figures.bootstrap_differences(
            label_table(), _classes(study, level), predictions, [pair["names"] for pair in own], plan["bootstrap"]
        )
        for pair, interval in zip(own, intervals, strict=True):
            pair["patients"] = list(interval)
    for pair in found:
        one, two = ([by_name[name] for name in side] for side in pair.pop("names"))
        for split in ("test", "validation"):
            for figure in ("mAP", "score"):
                pair[f"{split}_{figure}"] = figures.paired_over_seeds(*(_values(s, split, figure) for s in (one, two)))
    return found


def _values(runs: Iterable[dict[str, Any]], split: str, figure: str) -> list[float]:
    return [run[split][figure] for run in runs]


def _health(study: Study) -> dict[str, dict[str, Any]]:
    """Of each pretext its health figures over the seeds."""
    found = {}
    for pretext in [*study.plan["pretexts"], *study.plan["variants"]]:
        names = [f"pretrain-{pretext}-s{seed}" for seed in study.plan["seeds"]]
        if all(map(study.done, names)):
            kept = [study.result(name) for name in names]
            found[pretext] = {
                key: figures.over_seeds([one["health"][key] for one in kept]) for key in kept[0]["health"]
            } | {"core_seconds": figures.over_seeds([one["core_seconds"] for one in kept])}
    return found
