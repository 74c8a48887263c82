# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The pieces of work: data, pretraining, fine-tuning; each leaves its result in the study's folder."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from benchmarks.common import ROOT, revision
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

from . import classify, figures
from .data import Patients, load_patients, write_patients
from .health import position_figures, probe_figures
from .plan import FIRST_LEVEL, WORKER_THREADS, Task, run_name
from .pretexts import pretext_settings, pretrain
from .state import Study
from .training import recalibrate

logger = logging.getLogger("benchmarks.label_efficiency")
LAST = 20  # steps whose mean loss is recorded


@lru_cache(maxsize=1)
def label_table() -> LabelTable:
    """The bundle's own."""
    return LabelTable.from_file(ROOT / figures.LABELS_FILE)


def work(study: Study) -> None:
    """Do tasks until none is left that can be done; one that fails does not keep the others from being done.

    Raises:
        RuntimeError: at the end, naming those that failed.
    """
    torch.set_num_threads(WORKER_THREADS)
    actions = {"data": make_data, "pretrain": make_weights, "fine_tune": make_classifiers}
    for task in study.next_tasks():
        start = time.monotonic(), time.process_time()
        try:
            actions[task.kind](study, task, start)
        except Exception:
            logger.exception("%s failed", task.names[0])
            study.fail(task, traceback.format_exc())
            continue
        logger.info("%s: %.0f s", ", ".join(task.names), time.monotonic() - start[0])


def _record_of(task: Task, start: tuple[float, float]) -> dict[str, Any]:
    kept = {key: value for key, value in vars(task).items() if value not in ("", ()) and key != "rates"}
    spent = {"seconds": time.monotonic() - start[0], "core_seconds": time.process_time() - start[1]}
    return {**kept, **spent, "revision": revision()}


def make_data(study: Study, task: Task, start: tuple[float, float]) -> None:
    """Render a split."""
    found = write_patients(study.plan, task.level, task.split, study.data)
    study.record(task.names[0], {**found, **_record_of(task, start)})


def make_weights(study: Study, task: Task, start: tuple[float, float]) -> None:
    """Pretrain a network, measure its health on the validation volumes, keep its backbone."""
    plan = study.plan
    pool, validation = (load_patients(study.data, FIRST_LEVEL, split) for split in ("pool", "validation"))
    network, losses = pretrain(plan, task.pretext, task.seed, pool.volumes)
    settings = pretext_settings(plan, task.pretext)
    health = position_figures(plan, network, validation, settings["form"])
    backbone = network.student.backbone
    number = plan["health"]["recalibration_volumes"]
    recalibrate(backbone, pool.volumes[:number], plan["fine_tuning"]["num_slices"])
    health |= probe_figures(plan, backbone, validation)
    path = study.weights / f"{task.pretext}-s{task.seed}.pt"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(backbone.state_dict(), temporary)
    os.replace(temporary, path)
    loss = {"first": losses[0], "last": sum(losses[-LAST:]) / len(losses[-LAST:])} if losses else None
    result = {"settings": settings, "loss": loss, "health": health, **_record_of(task, start)}
    study.record(task.names[0], result)


def make_classifiers(study: Study, task: Task, start: tuple[float, float]) -> None:
    """Fine-tune at each rate of the task; validation figures are recorded, test predictions stored unseen."""
    plan, table = study.plan, label_table()
    weights = torch.load(study.weights / f"{task.pretext}-s{task.seed}.pt", weights_only=True)
    patients = {split: load_patients(study.data, task.level, split) for split in ("pool", "validation", "test")}
    images: dict[str, Any] = {split: found.volumes for split, found in patients.items()}
    labelled = plan["data"]["labelled"]
    images["pool"] = images["pool"][:labelled]
    if task.mode == "frozen":
        backbone = classify.make_classifier(plan, table, "full", task.seed, weights).backbone
        images = {split: classify.frozen_features(backbone, volumes) for split, volumes in images.items()}
    for rate in task.rates:
        _fine_tune(study, task, rate, None if task.mode == "frozen" else weights, images, patients, start)
        start = time.monotonic(), time.process_time()


def _fine_tune(
    study: Study,
    task: Task,
    rate: int,
    weights: Mapping[str, torch.Tensor] | None,
    images: Mapping[str, Any],
    patients: Mapping[str, Patients],
    start: tuple[float, float],
) -> None:
    plan, table = study.plan, label_table()
    settings = classify.settings_of(plan, rate)
    network = classify.make_classifier(plan, table, task.mode, task.seed, weights)
    subset = classify.labelled_subset(plan["data"]["labelled"], rate, task.seed)
    classes = patients["pool"].classes[subset]
    losses = classify.fine_tune(plan, table, network, images["pool"][subset], classes, task.seed, settings["steps"])
    predicted = {split: classify.predict(plan, table, network, images[split]) for split in ("validation", "test")}
    result = {
        "rate": rate,
        "labels": len(subset),
        "settings": settings,
        "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "validation": figures.point_figures(table, patients["validation"].classes, predicted["validation"]),
    }
    name = run_name(task.level, task.pretext, task.seed, task.mode, rate)
    study.record(name, {**result, **_record_of(task, start)}, **predicted)
