# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The one table of groups, classes and weights that the loss, the score, the data list and the outputs read.

A *group* is an organ or a finding (``liver``), a *class* one of its exclusive states (``healthy``, ``low``, ``high``).
The first class is the healthy one, the others follow in order of severity. The table is a JSON file
(``configs/labels.json``), so that another organ or another injury needs no Python:

    {"groups": [{"name": "liver", "classes": [{"name": "healthy"}, {"name": "injury", "loss_weight": 2}]}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.utils import convert_to_tensor

from .label_groups import AnyInjury, LabelClass, LabelGroup, check_keys, first_few, parse_any, parse_group, raise_error

__all__ = ["MISSING", "AnyInjury", "LabelClass", "LabelGroup", "LabelTable", "first_few", "raise_error"]

MISSING = -1  # class index of a group without a label; masked in loss, score and metrics
_RESERVED = frozenset({"patient_id", "series_id", "score", "mAP"})


@dataclass(frozen=True)
class LabelTable:
    """Groups in the order of the logits, and the any-injury term (``None``: not scored).

    For RSNA 2023: 5 groups, 11 logits (bowel 1, extravasation 1, kidney, liver, spleen 3 each) and 13 probability
    columns.
    """

    groups: tuple[LabelGroup, ...]
    any_injury: AnyInjury | None = None

    @classmethod
    def from_file(cls, path: str | Path, groups: Sequence[str] | None = None) -> LabelTable:
        """Reads and checks a table.

        Args:
            path: JSON file as ``configs/labels.json``.
            groups: names of the groups to keep, see :meth:`select`; ``None`` keeps all.

        Raises:
            ValueError: the file is no JSON or no valid table; the message names the file and the entry.
        """
        try:
            table = cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
            return table if groups is None else table.select(groups)
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"label table {path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LabelTable:
        """The table of a parsed JSON object. Raises ValueError as :meth:`from_file`."""
        check_keys("the table", content, required={"groups"}, optional={"any_injury", "name", "_desc_"})
        groups = content["groups"]
        if not isinstance(groups, list) or not groups:
            raise ValueError(f"'groups' must be a list with at least one group, got {groups!r}")
        any_injury = content.get("any_injury")
        table = cls(
            tuple(parse_group(group) for group in groups), None if any_injury is None else parse_any(any_injury)
        )
        names = [group.name for group in table.groups] + list(table.columns)
        names += [table.any_injury.name] if table.any_injury else []
        twice = sorted({name for name in names if names.count(name) > 1} | (_RESERVED & set(names)))
        if twice:
            raise ValueError(f"names of groups and columns must be unique and not reserved, got {first_few(twice)}")
        return table

    def select(self, names: Sequence[str]) -> LabelTable:
        """The table of some groups, in the table's order: single-organ heads by config.

        The any-injury term is about all groups, so a true selection has none.
        """
        known = self.group_names
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"unknown groups: {first_few(unknown) or 'none given'}; the table has {', '.join(known)}")
        kept = tuple(group for group in self.groups if group.name in names)
        return LabelTable(kept, self.any_injury if len(kept) == len(self.groups) else None)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the G groups."""
        return tuple(group.name for group in self.groups)

    @property
    def slice_groups(self) -> tuple[str, ...]:
        """Names of the groups that have labels of single slices."""
        return tuple(group.name for group in self.groups if group.image_level_name)

    @property
    def heads(self) -> dict[str, int]:
        """Number of logits of each group, the heads of the network."""
        return {group.name: group.num_logits for group in self.groups}

    @property
    def num_logits(self) -> int:
        """Width of the network's output."""
        return sum(group.num_logits for group in self.groups)

    @property
    def logit_slices(self) -> dict[str, slice]:
        """Where each group lies in the logits."""
        return _slices(self.heads)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the P probability columns, as in RSNA's ``sample_submission.csv`` without ``patient_id``."""
        return tuple(column for group in self.groups for column in group.columns)

    @property
    def column_slices(self) -> dict[str, slice]:
        """Where each group lies in the columns."""
        return _slices({group.name: len(group.classes) for group in self.groups})

    @property
    def injury_columns(self) -> tuple[str, ...]:
        """Columns of the injured classes: all but the first of each group (eight for RSNA 2023)."""
        return tuple(column for group in self.groups for column in group.columns[1:])

    @property
    def channel_def(self) -> dict[str, str]:
        """Meaning of each logit as ``network_data_format`` in ``metadata.json`` wants it: index as text -> column."""
        names = [name for group in self.groups for name in (group.columns[1:] if group.is_binary else group.columns)]
        return {str(index): name for index, name in enumerate(names)}

    def class_index(self, row: Mapping[str, Any] | pd.Series) -> np.ndarray:
        """[G] int64 class indices of one row of class columns, see :meth:`class_indices`."""
        return self.class_indices(pd.DataFrame([dict(row)]))[0]

    def class_indices(self, frame: pd.DataFrame, refuse: Callable[[str], None] = raise_error) -> np.ndarray:
        """Class indices of a frame with one 0/1 column a class.

        Args:
            frame: N rows. A group none of whose columns exist, or whose cells are all blank in a row, is missing.
            refuse: told of each fault; by default the first is an error, else what is wrong counts as missing.

        Returns:
            [N, G] int64, ``MISSING`` (-1) where a group has no label.

        Raises:
            ValueError: no group has columns, a group has some of its columns only, or rows are not one 1 and else 0.
        """
        if not set(self.columns) & set(frame.columns):
            refuse(f"none of the class columns {first_few(self.columns)} found among {first_few(frame.columns)}")
        indices = np.full((len(frame), len(self.groups)), MISSING, dtype=np.int64)
        for position, group in enumerate(self.groups):
            absent = [column for column in group.columns if column not in frame.columns]
            if not absent:
                indices[:, position] = _group_indices(frame, group, refuse)
            elif len(absent) < len(group.columns):
                refuse(f"group '{group.name}' lacks the columns {first_few(absent)}")
        return indices

    def one_hot(self, indices: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`class_indices`: [N, G] -> [N, P] float64 of 0 and 1, NaN in groups without a label."""
        blocks = []
        for position, group in enumerate(self.groups):
            index = np.asarray(indices)[:, position, None]  # [N, 1]
            blocks.append(np.where(index == MISSING, np.nan, index == np.arange(len(group.classes))))
        return np.concatenate(blocks, axis=1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Class probabilities: sigmoid of the one logit of a two-class group as (1 - p, p), softmax elsewhere.

        Args:
            logits: [..., L].

        Returns:
            [..., P] of the same precision (half precision is raised to float32); each group sums to 1.
        """
        logits = convert_to_tensor(logits, track_meta=False)
        if logits.shape[-1] != self.num_logits:
            raise ValueError(
                f"expected {self.num_logits} logits for {', '.join(self.group_names)}, got {tuple(logits.shape)}"
            )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        blocks = []
        for group, part in zip(self.groups, logits.split(list(self.heads.values()), dim=-1), strict=True):
            # sigmoid(-z) rather than 1 - sigmoid(z): no cancellation for confident injuries
            blocks.append(torch.cat((-part, part), -1).sigmoid() if group.is_binary else part.softmax(-1))
        return torch.cat(blocks, dim=-1)


def _slices(widths: Mapping[str, int]) -> dict[str, slice]:
    stops = np.cumsum(list(widths.values())).tolist()
    return {name: slice(stop - width, stop) for (name, width), stop in zip(widths.items(), stops, strict=True)}


def _group_indices(frame: pd.DataFrame, group: LabelGroup, refuse: Callable[[str], None]) -> np.ndarray:
    """[N] class indices of one group whose columns all exist."""
    try:
        values = frame[list(group.columns)].apply(pd.to_numeric).to_numpy(dtype=np.float64)  # [N, C]
    except (ValueError, TypeError):
        refuse(f"group '{group.name}': the columns {', '.join(group.columns)} must be numbers")
        return np.full(len(frame), MISSING)
    blank = np.isnan(values).all(axis=1)
    valid = np.isin(values, (0.0, 1.0)).all(axis=1) & (values.sum(axis=1) == 1)
    wrong = np.flatnonzero(~(valid | blank))
    if len(wrong):
        where = frame["patient_id"].iloc[wrong] if "patient_id" in frame.columns else frame.index[wrong]
        refuse(
            f"group '{group.name}': {len(wrong)} of {len(frame)} rows are not one 1 and else 0 (must sum to 1): "
            f"{first_few(where)}; the first holds {values[wrong[0]].tolist()}"
        )
    return np.where(~valid, MISSING, np.nan_to_num(values).argmax(axis=1))
