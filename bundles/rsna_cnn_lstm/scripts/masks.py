# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which organ mask belongs to which series."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_masks"]

NIFTI = (".nii.gz", ".nii")


def add_masks(
    items: Sequence[Mapping[str, Any]], crop: str, dataset_dir: str | None, mask_dir: str | None = None
) -> list[dict[str, Any]]:
    """With crop "organs": the items with ``mask``, a path, or "" for a series without one. Else the items as they are.

    A mask that an item has stays. The others are looked for below `mask_dir` under the series' id: a file
    ``<series_id>.nii.gz`` or ``.nii``, or a folder ``<series_id>`` with one file an organ.

    Args:
        items: series with ``series_id``.
        crop: "body" or "organs".
        dataset_dir: its ``segmentations`` is `mask_dir` where that is None.
        mask_dir: folder of the masks.

    Raises:
        ValueError: `mask_dir` is given and is no folder.
    """
    if crop != "organs":
        return [dict(item) for item in items]
    if mask_dir is None and dataset_dir is None:
        return [{**item, "mask": item.get("mask") or ""} for item in items]
    folder = Path(dataset_dir) / "segmentations" if mask_dir is None else Path(mask_dir).expanduser()
    if mask_dir is not None and not folder.is_dir():
        raise ValueError(f"mask_dir: expected a folder of masks, found none at {folder}")
    return [{**item, "mask": item.get("mask") or _find(folder, item)} for item in items]


def _find(folder: Path, item: Mapping[str, Any]) -> str:
    """Path of the series' mask, or an empty string."""
    series_id = item["series_id"]
    bare = next((series_id[: -len(end)] for end in NIFTI if series_id.lower().endswith(end)), series_id)
    candidates = [folder / f"{bare}{end}" for end in NIFTI] + [folder / bare]
    return next((str(path) for path in candidates if _is_mask(path, folder, item.get("image", ""))), "")


def _is_mask(path: Path, folder: Path, image: str) -> bool:
    """Whether a path is below the folder, where an absolute series id or one with ``..`` leads away from it, and not
    the image itself."""
    if Path(os.path.abspath(folder)) not in Path(os.path.abspath(path)).parents or not path.exists():
        return False
    return not (os.path.exists(image) and path.samefile(image))
