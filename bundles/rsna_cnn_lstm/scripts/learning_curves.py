# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Scalars that a training run has written for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["by_epoch", "read_scalars"]


def read_scalars(folder: str | Path) -> dict[str, pd.Series]:
    """Tag -> values by step, of all event files of a folder; empty without any.

    A run that was resumed has written some steps twice: the later value counts.
    """
    points: dict[str, list[tuple[float, int, float]]] = {}
    for file in sorted(Path(folder).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, []).extend((e.wall_time, e.step, e.value) for e in events.Scalars(tag))
    scalars = {}
    for tag, values in sorted(points.items()):
        frame = pd.DataFrame(sorted(values), columns=["time", "step", "value"])
        scalars[tag] = frame.drop_duplicates("step", keep="last").set_index("step")["value"].sort_index()
    return scalars


def by_epoch(scalars: dict[str, pd.Series]) -> pd.DataFrame:
    """The values of each epoch, one column a tag: mean losses as ``loss`` and ``loss_<term>``, and the validation
    score as ``validation score`` (the runs log minus the score, for engines look for a maximum)."""
    columns = {tag: values for tag, values in scalars.items() if tag == "loss" or tag.startswith("loss_")}
    if "negative_score" in scalars:
        columns["validation score"] = -scalars["negative_score"]
    frame = pd.DataFrame(columns).sort_index()
    frame.index.name = "epoch"
    return frame
