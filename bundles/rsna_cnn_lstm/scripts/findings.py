# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Labels of single images: which slices of a series show which injury.

``image_level_labels.csv`` (patient_id, series_id, instance_number, injury_name) lists positive images only, and not of
every injured series. A group of the label table with an ``image_level_name`` takes the rows of that injury_name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .datalist import read_table
from .labels import LabelTable, first_few

__all__ = ["add_findings", "read_image_labels"]

logger = logging.getLogger(__name__)

IMAGE_LABELS = "image_level_labels.csv"
SeriesKey = tuple[str, str]  # patient, series


def read_image_labels(csv_file: str | Path, table: LabelTable) -> dict[SeriesKey, dict[str, list[int]]]:
    """(patient, series) -> group -> InstanceNumbers of the images that show it.

    Raises:
        ValueError: columns are missing, or an instance_number is no integer; the message names the file.
    """
    frame = read_table(csv_file, ["patient_id", "series_id", "instance_number", "injury_name"], unique=False)
    numbers = pd.to_numeric(frame["instance_number"], errors="coerce")
    wrong = numbers.isna() | (numbers % 1 != 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{csv_file}: {int(wrong.sum())} rows whose instance_number is no integer, the first is row {row + 2}:"
            f" {frame['instance_number'][row]!r}"
        )
    of_name = {group.image_level_name: group.name for group in table.groups if group.image_level_name}
    unused = sorted(set(frame["injury_name"]) - set(of_name))
    if unused:
        logger.warning("%s: no group has the image_level_name %s; these rows are not used", csv_file, first_few(unused))
    found: dict[SeriesKey, dict[str, list[int]]] = {}
    for patient, series, number, name in zip(
        frame["patient_id"], frame["series_id"], numbers.astype(int), frame["injury_name"], strict=True
    ):
        if name in of_name:
            found.setdefault((patient, series), {}).setdefault(of_name[name], []).append(int(number))
    return found


def add_findings(
    items: Sequence[Mapping[str, Any]], table: LabelTable, dataset_dir: str | None, datalist: str | None = None
) -> list[dict[str, Any]]:
    """The items with ``findings``: group -> InstanceNumbers, ``[]`` where none shows it, None where that is unknown.

    A healthy group shows nothing in any image. An injured group with listed images of this series is in those and in no
    other; without any it is unknown, as it is where listed images contradict a healthy label (which is logged).

    Args:
        items: with ``label``, see `cohort.labelled_series`; those of a datalist may have ``findings`` already.
        table: the label table; only its groups with an ``image_level_name`` get labels.
        dataset_dir: where ``image_level_labels.csv`` is read, if there is no `datalist`.
        datalist: its name for messages.

    Raises:
        ValueError: there is no such group, no such file, or not one listed image for these items.
    """
    if not table.slice_groups:
        raise ValueError(
            "slice labels are asked for, but no group of the label table has an image_level_name; the groups are"
            f" {', '.join(table.group_names)}"
        )
    if datalist is None:
        source = str(Path(str(dataset_dir)) / IMAGE_LABELS)
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file; slice labels are asked for (slice_loss_weight)")
        listed = read_image_labels(source, table)
    else:
        source = f"datalist {datalist}"
        listed = {_key(item): _own(item, table, source) for item in items if item.get("findings") is not None}
    if not any(listed.get(_key(item)) for item in items):
        raise ValueError(
            f"{source}: none of {len(items)} series has a listed image of {', '.join(table.slice_groups)}; slice labels"
            " are asked for (slice_loss_weight)"
        )
    contradictions: list[str] = []
    labelled = [
        {**item, "findings": _findings(item, listed.get(_key(item), {}), table, contradictions)} for item in items
    ]
    if contradictions:
        logger.warning(
            "%s: %d groups are healthy by their label and have listed images; their slices count as unknown: %s",
            source, len(contradictions), first_few(contradictions),
        )  # fmt: skip
    return labelled


def _key(item: Mapping[str, Any]) -> SeriesKey:
    return item["patient_id"], item["series_id"]


def _own(item: Mapping[str, Any], table: LabelTable, source: str) -> dict[str, list[int]]:
    """A datalist entry's findings, checked."""
    findings = item["findings"]
    if not isinstance(findings, Mapping) or not all(
        isinstance(numbers, list) and all(type(number) is int for number in numbers) for numbers in findings.values()
    ):
        raise ValueError(
            f"{source}: {item['image']}: expected findings as a list of instance numbers by group, found {findings!r}"
        )
    unknown = sorted(set(findings) - set(table.slice_groups))
    if unknown:
        logger.warning("%s: %s: no slice labels for the groups %s", source, item["image"], first_few(unknown))
    return {group: numbers for group, numbers in findings.items() if group in table.slice_groups and numbers}


def _findings(
    item: Mapping[str, Any], listed: Mapping[str, list[int]], table: LabelTable, contradictions: list[str]
) -> dict[str, list[int] | None]:
    """Findings of one series; what the label denies is added to `contradictions`."""
    findings: dict[str, list[int] | None] = {}
    for position, group in enumerate(table.group_names):
        if group not in table.slice_groups:
            continue
        numbers = listed.get(group)
        healthy = int(item["label"][position]) == 0
        if healthy and numbers:
            contradictions.append(f"{'/'.join(_key(item))} {group}")
        findings[group] = ([] if not numbers else None) if healthy else (numbers or None)
    return findings
