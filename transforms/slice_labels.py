# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Findings of single images of a series -> labels of the slices that the network sees.

RSNA 2023's `image_level_labels.csv` names images by InstanceNumber, in whatever order the scanner counted. Body crop
and resizing move and merge slices, so the way from one to the other leads through the patient's coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends

from .errors import SeriesError

__all__ = ["UNKNOWN", "SliceLabels", "SliceLabelsd"]

UNKNOWN = -1.0  # label of a slice of which nothing is known
TOLERANCE = 0.01  # mm; an image on the border between two slices counts for both, whatever the rounding


class SliceLabels(Transform):
    """Label of each slice of `ExtractSlices` and each group: 1 shows it, 0 does not, -1 unknown.

    A slice stands for the stretch of z that reaches half the way to its neighbours on either side (to the outside as
    far as to the inside). It is positive if a listed image has its centre in that stretch, or if the image nearest to
    the slice is a listed one, which decides where images are farther apart than slices.

    Args:
        groups: order of the K columns.

    Returns:
        [S, K] float32.

    Raises:
        SeriesError: a listed InstanceNumber does not occur in the series (a NIfTI file has none at all).

    Example::

        >>> slices = ExtractSlices(num_slices=48)(LoadSeries()("series_folder"))
        >>> SliceLabels(groups=["bowel", "extravasation"])(slices, {"bowel": [17, 18], "extravasation": None})
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, *, groups: Sequence[str]) -> None:
        if isinstance(groups, str) or not groups:
            raise ValueError(f"groups must be a list of at least one name, got {groups!r}.")
        self.groups = tuple(groups)

    def __call__(self, slices: MetaTensor, findings: Mapping[str, Sequence[int] | None]) -> torch.Tensor:
        """Label `slices`, what `ExtractSlices` returned.

        Args:
            slices: [C, X, Y, S] with meta data of `LoadSeries` and `ExtractSlices`; in-plane transforms do no harm.
            findings: group -> InstanceNumbers of the images that show it; an empty list where none does, None (or no
                entry) where that is unknown.
        """
        if "slice_offsets" not in slices.meta:
            raise ValueError('The image has no meta["slice_offsets"]: it does not come from ExtractSlices.')
        affine = np.asarray(slices.affine, dtype=np.float64)
        places = np.asarray(slices.meta["slice_offsets"], dtype=np.float64)  # [S] in steps along z
        numbers, heights = _source_heights(slices, affine)
        tolerance = TOLERANCE / float(np.linalg.norm(affine[:3, 2]))
        labels = torch.full((len(places), len(self.groups)), UNKNOWN)
        for column, group in enumerate(self.groups):
            listed = findings.get(group)
            if listed is None:
                continue
            absent = sorted(set(listed) - set(numbers.tolist()))
            if absent:
                raise SeriesError(
                    f"{slices.meta.get('filename_or_obj', 'volume')}: expected images with the InstanceNumbers"
                    f" {absent[:5]} that the labels of {group} name, found {len(numbers)} numbered images without them."
                )
            shown = _shown(places, heights, np.isin(numbers, list(listed)), tolerance)
            labels[:, column] = torch.from_numpy(shown).float()
        return labels


class SliceLabelsd(MapTransform):
    """Dictionary version of `SliceLabels`: the findings under each key give way to their labels under `label_key`.

    Args:
        keys: of the findings; they leave the dictionary.
        groups: see `SliceLabels`.
        image_key: slices of `ExtractSlicesd`.
        label_key: of the result.
    """

    backend = SliceLabels.backend

    def __init__(
        self,
        keys: KeysCollection = "findings",
        *,
        groups: Sequence[str],
        image_key: str = "image",
        label_key: str = "slice_label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"keys must be one key, got {self.keys}.")
        self.labeller = SliceLabels(groups=groups)
        self.image_key, self.label_key = image_key, label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the labels to a copy of `data`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.label_key] = self.labeller(d[self.image_key], d.pop(key))
        return d


def _source_heights(slices: MetaTensor, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """InstanceNumber of each image of the source, and its place along z in steps of `affine`."""
    source = np.asarray(json.loads(slices.meta.get("source_slices", "[]")), dtype=np.float64).reshape(-1, 4)
    centres = np.concatenate([source[:, 1:], np.ones((len(source), 1))], axis=1)
    return source[:, 0].astype(np.int64), centres @ np.linalg.inv(affine)[2]


def _shown(places: np.ndarray, heights: np.ndarray, listed: np.ndarray, tolerance: float) -> np.ndarray:
    """[S] whether each slice shows a listed image; see `SliceLabels`."""
    if not listed.any():
        return np.zeros(len(places), dtype=bool)
    distinct, back = np.unique(places, return_inverse=True)  # a short volume repeats slices
    inner = (distinct[1:] + distinct[:-1]) / 2
    first, last = (inner[0], inner[-1]) if len(inner) else (distinct[0] + 0.5, distinct[-1] - 0.5)
    edges = np.concatenate([[2 * distinct[0] - first], inner, [2 * distinct[-1] - last]])
    found = heights[listed]
    inside = (found >= edges[:-1, None] - tolerance) & (found <= edges[1:, None] + tolerance)  # (slices, listed)
    away = np.abs(heights - distinct[:, None])  # (slices, images)
    nearest = away <= away.min(axis=1, keepdims=True) + tolerance
    return (inside.any(axis=1) | (nearest & listed).any(axis=1))[back]
