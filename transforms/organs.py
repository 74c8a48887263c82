# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Crop a CT volume to its organs, by any NIfTI mask of them: RSNA 2023's, TotalSegmentator's, or one's own.

Crops to organ masks come from the winners of the RSNA 2023 abdominal trauma challenge. A mask is laid over the image by
its affine, never by its array: RSNA's masks are stored in another order than the DICOM slices.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, ensure_tuple
from nibabel.processing import resample_from_to

from .body import CropBody, CropBodyd
from .errors import SeriesError
from .nifti import is_nifti, load_nifti

__all__ = ["CropSeriesd", "LoadOrganMask"]

ORGAN_FILES = ("liver", "spleen", "kidney*", "colon", "small_bowel", "duodenum", "bowel")
MIN_INSIDE = 0.5  # of the organs' volume; a mask of another series or space lies beside the image
SAME_GRID = 1e-3  # voxels


class LoadOrganMask(Transform):
    """Mask of the organs of interest on the voxels of an image.

    Args:
        labels: labels of a mask file that count; None for all but 0. Files of a folder are chosen by their names.

    The path is a NIfTI file, or a folder with one file an organ as TotalSegmentator writes it: those named liver,
    spleen, kidney*, colon, small_bowel, duodenum and bowel count. Another grid than the image's is resampled to it,
    nearest voxel.

    Returns:
        MetaTensor [1, X, Y, Z] uint8, 1 in the organs.

    Raises:
        SeriesError: no such file, no label or organ in it, or less than half of the organs' volume inside the image.

    Example::

        >>> LoadOrganMask(labels=[1, 2, 3, 5])("total.nii.gz", LoadSeries()("series_folder"))
    """

    backend = [TransformBackends.NUMPY]

    def __init__(self, *, labels: Sequence[int] | int | None = None) -> None:
        self.labels = None if labels is None else ensure_tuple(labels)
        if self.labels is not None and not (self.labels and all(isinstance(v, int) and v > 0 for v in self.labels)):
            raise ValueError(f"labels must be integers above 0, got {labels!r}.")

    def __call__(self, path: PathLike, image: MetaTensor) -> MetaTensor:
        """The mask at `path` on the grid of `image` [C, X, Y, Z]."""
        where = Path(path)
        placed = np.zeros(image.shape[1:], dtype=np.uint8)
        total = 0.0  # mm3
        for file in _mask_files(where):
            volume = load_nifti(file, dtype=np.dtype("int16"), eight_bit_window=None, source=str(file), labels=True)
            values = volume.as_tensor()[0].numpy()
            organs = np.isin(values, self.labels) if self.labels is not None and file == where else values > 0
            total += float(organs.sum() * _voxel(volume))
            placed |= _onto(organs.astype(np.uint8), volume, image)
        if total == 0:
            wanted = "a voxel above 0" if self.labels is None else f"the labels {list(self.labels)}"
            raise SeriesError(f"{where}: expected a mask that holds {wanted}, found it empty.")
        inside = float(placed.sum() * _voxel(image)) / total
        if inside < MIN_INSIDE:
            raise SeriesError(
                f"{where}: expected a mask in the space of its image, found {inside:.0%} of the organs inside it."
            )
        return MetaTensor(torch.from_numpy(placed)[None], affine=image.affine)


class CropSeriesd(CropBodyd):
    """Crop to the body or to the organs of a mask file, as a config chooses.

    Args:
        keys: volumes in HU to crop, of equal spatial shape; the first one decides where the body is.
        crop: "body" (see `CropBody`), or "organs": the box of the organs and a margin around them.
        mask_key: path of the mask, see `LoadOrganMask`; None or "" for a series without one.
        organ_labels: labels of mask files that count; None for all but 0.
        organ_margin: mm around the organs.
        missing: with crop "organs", a series without a mask is an "error", or cropped to its "body" instead. A mask
            that is there but does not fit is an error always.

    Raises:
        SeriesError: as `CropBody` and `LoadOrganMask`, and for a series without a mask.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        crop: Literal["body", "organs"] = "body",
        mask_key: str = "mask",
        organ_labels: Sequence[int] | int | None = None,
        organ_margin: float = 10.0,
        missing: Literal["error", "body"] = "error",
        allow_missing_keys: bool = False,
    ) -> None:
        if crop not in ("body", "organs"):
            raise ValueError(f'crop must be "body" or "organs", got {crop!r}.')
        if missing not in ("error", "body"):
            raise ValueError(f'missing must be "error" or "body", got {missing!r}.')
        if not (organ_margin >= 0 and math.isfinite(organ_margin)):
            raise ValueError(f"organ_margin must be at least 0, got {organ_margin!r}.")
        super().__init__(keys, mask_key=mask_key, allow_missing_keys=allow_missing_keys)
        # with crop "body" nothing of the organs is kept, so that those options leave a cache of prepared volumes valid
        self.organs: tuple[LoadOrganMask, CropBody] | None = None
        self.missing = missing if crop == "organs" else None
        if crop == "organs":
            self.organs = LoadOrganMask(labels=organ_labels), CropBody(margin_mm=organ_margin)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Crop every key of a copy of `data`; the mask's path stays as it is."""
        d = dict(data)
        box = self._box(d[self.source_key], d.get(self.mask_key))
        for key in self.key_iterator(d):
            d[key] = self.cropper.crop(d[key], box, lazy=lazy)
        return d

    def _box(self, image: MetaTensor, path: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.organs is None or (not path and self.missing == "body"):
            return self.cropper.bounding_box(image)
        if not path:
            raise SeriesError(
                f"{image.meta.get('filename_or_obj', 'volume')}: expected a mask to crop to the organs, found none"
                ' (crop_missing "body" takes the body instead).'
            )
        load, cropper = self.organs
        return cropper.bounding_box(image, load(path, image))


def _mask_files(path: Path) -> list[Path]:
    """The file itself, or the organs' files of a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SeriesError(f"{path}: expected a NIfTI mask or a folder of them, found nothing there.")
    files = [
        file
        for file in sorted(path.iterdir())
        if is_nifti(file) and any(fnmatch.fnmatchcase(file.name.split(".")[0], name) for name in ORGAN_FILES)
    ]
    if not files:
        raise SeriesError(f"{path}: expected NIfTI masks named {', '.join(ORGAN_FILES)}, found none.")
    return files


def _voxel(volume: MetaTensor) -> float:
    """Volume of a voxel in mm3."""
    return float(abs(np.linalg.det(np.asarray(volume.affine, dtype=np.float64)[:3, :3])))


def _onto(mask: np.ndarray, volume: MetaTensor, image: MetaTensor) -> np.ndarray:
    """`mask` [X, Y, Z] on the grid of `volume` -> on the grid of `image`, nearest voxel, 0 outside."""
    source, target = (np.asarray(v.affine, dtype=np.float64) for v in (volume, image))
    shape = tuple(image.shape[1:])
    if mask.shape == shape and np.abs(np.linalg.inv(source) @ target - np.eye(4)).max() < SAME_GRID:
        return mask
    # "grid-constant": a mask ends at the border of its outermost voxels, not at their centres
    resampled = resample_from_to(nib.Nifti1Image(mask, source), (shape, target), order=0, mode="grid-constant")
    return np.asarray(resampled.dataobj, dtype=np.uint8)
