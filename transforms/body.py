# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Crop a CT volume to the patient's body, or to an organ mask.

The method (2D-VoCo, arXiv 2601.14593, after VoCo) crops to the foreground above 0.3 of the window -175..250 HU, which
is -47.5 HU. Taken over all voxels that box reaches to the skin, but it includes the table and whatever lies on it. Here
it is the box of the largest connected region after thin structures are opened away. The skin is one of those, and fat
(about -100 HU) lies below the method's threshold, so the default is lower: with -47.5 the box would end at the muscles.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, Cropd, generate_spatial_bounding_box
from monai.transforms.utils import get_largest_connected_component_mask
from monai.utils import ensure_tuple

from .errors import SeriesError

__all__ = ["CropBody", "CropBodyd"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (start, end) voxels along X, Y, Z; end exclusive

IN_PLANE_SAMPLE = 3.0  # mm; the region is found on a subsampled volume, an 8-bit image's worth of work for a CT
AXIAL_SAMPLE = 5.0  # mm
OPENING = 12.0  # mm; what is thinner in a slice (table top, blanket, tubes) is not body


class CropBody(Crop):
    """Crop to the bounding box of the largest connected body region, or of a mask.

    Args:
        threshold_hu: voxels above it may be body.
        margin_mm: added on every side, as far as the volume goes.
        mask_labels: with a mask: the labels that count (e.g. liver and spleen); None takes all above 0.

    The box is found at steps of about 3 mm in the slice and 5 mm between slices, and widened by one step, so that it is
    up to a step larger than the body but does not cut it (corners that the opening rounds off excepted). The result is
    a view of the input and keeps a correct affine; `inverse` pads it back.

    Raises:
        SeriesError: no body (all air, nothing thicker than 12 mm), or an empty mask.

    Example::

        >>> CropBody(margin_mm=5.0)(LoadSeries()("series_folder"))
    """

    def __init__(
        self, *, threshold_hu: float = -250.0, margin_mm: float = 0.0, mask_labels: Sequence[int] | int | None = None
    ) -> None:
        super().__init__()
        if not math.isfinite(threshold_hu):
            raise ValueError(f"threshold_hu must be finite, got {threshold_hu!r}.")
        if not (margin_mm >= 0 and math.isfinite(margin_mm)):
            raise ValueError(f"margin_mm must be at least 0, got {margin_mm!r}.")
        self.threshold_hu = threshold_hu
        self.margin_mm = margin_mm
        self.mask_labels = None if mask_labels is None else ensure_tuple(mask_labels)

    @property
    def requires_current_data(self) -> bool:
        """The box is read off the voxels, so a lazy pipeline has to resample before."""
        return True

    def __call__(  # type: ignore[override]
        self, img: torch.Tensor, mask: torch.Tensor | None = None, lazy: bool | None = None
    ) -> torch.Tensor:
        """Crop the volume `img` [C, X, Y, Z] in HU; `mask` [1, X, Y, Z] takes the place of the body."""
        return self.crop(img, self.bounding_box(img, mask), lazy=lazy)

    def crop(self, img: torch.Tensor, box: Box, lazy: bool | None = None) -> torch.Tensor:
        """Crop `img` [C, X, Y, Z] to `box`."""
        return super().__call__(img, self.compute_slices(roi_start=box[0], roi_end=box[1]), lazy=lazy)

    def bounding_box(self, img: torch.Tensor, mask: torch.Tensor | None = None) -> Box:
        """Box of the body in the first channel of `img`, or of `mask`, with the margin, inside the volume."""
        if img.ndim != 4 or 0 in img.shape:
            raise ValueError(f"The volume must be [channels, X, Y, Z] and not empty, got the shape {tuple(img.shape)}.")
        if mask is None:
            start, end = self._body_box(img)
        else:
            start, end = self._mask_box(img, mask)
        margins = np.ceil(self.margin_mm / _spacing(img) - 1e-6).astype(int)
        start = np.maximum(np.asarray(start) - margins, 0)
        end = np.minimum(np.asarray(end) + margins, img.shape[1:])
        return tuple(start.tolist()), tuple(end.tolist())

    def _body_box(self, img: torch.Tensor) -> Box:
        spacing = _spacing(img)
        steps = np.maximum((np.array([IN_PLANE_SAMPLE, IN_PLANE_SAMPLE, AXIAL_SAMPLE]) / spacing).astype(int), 1)
        volume = img.as_tensor() if isinstance(img, MetaTensor) else torch.as_tensor(img)
        sampled = volume[0, :: steps[0], :: steps[1], :: steps[2]]
        # (slice, y, x) is contiguous in a volume of LoadSeries
        opened = _open_in_plane((sampled > self.threshold_hu).permute(2, 1, 0), (spacing * steps)[[1, 0]])
        if not opened.any():
            raise SeriesError(
                f"{_source(img)}: expected a body above {self.threshold_hu} HU, found none thicker than {OPENING} mm."
            )
        body = get_largest_connected_component_mask(opened.numpy(), connectivity=1)
        found = [np.flatnonzero(body.any(axis=axes)) for axes in ((0, 1), (0, 2), (1, 2))]  # X, Y, Z
        start = tuple(int(f[0] * s - (s - 1)) for f, s in zip(found, steps, strict=True))
        end = tuple(int(f[-1] * s + s) for f, s in zip(found, steps, strict=True))
        return start, end

    def _mask_box(self, img: torch.Tensor, mask: torch.Tensor) -> Box:
        if mask.shape[1:] != img.shape[1:]:
            raise ValueError(f"The mask's voxels {tuple(mask.shape[1:])} are not the image's {tuple(img.shape[1:])}.")
        if isinstance(img, MetaTensor) and isinstance(mask, MetaTensor):
            moved = torch.as_tensor(img.affine - mask.affine).abs().max()
            if moved > 0.1:
                raise ValueError(f"The mask's affine differs from the image's by up to {moved:.2f}: reorient it first.")
        wanted = torch.as_tensor(mask.as_tensor() if isinstance(mask, MetaTensor) else mask)
        if self.mask_labels is not None:
            wanted = torch.isin(wanted, torch.tensor(self.mask_labels, dtype=wanted.dtype, device=wanted.device))
        start, end = generate_spatial_bounding_box(wanted, allow_smaller=True)
        if any(s >= e for s, e in zip(start, end, strict=True)):
            labels = "any label" if self.mask_labels is None else f"the labels {self.mask_labels}"
            raise SeriesError(f"{_source(img)}: expected a mask that holds {labels}, found it empty.")
        return tuple(start), tuple(end)


class CropBodyd(Cropd):
    """Dictionary version of `CropBody`: one box for all keys.

    Args:
        keys: volumes and masks to crop, of equal spatial shape.
        source_key: the volume in HU in which the body is found; the first of `keys` unless given.
        mask_key: a mask that takes the place of the body; it is cropped too only if it is in `keys`.
        threshold_hu, margin_mm, mask_labels: see `CropBody`.
    """

    backend = CropBody.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        source_key: str | None = None,
        mask_key: str | None = None,
        threshold_hu: float = -250.0,
        margin_mm: float = 0.0,
        mask_labels: Sequence[int] | int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        cropper = CropBody(threshold_hu=threshold_hu, margin_mm=margin_mm, mask_labels=mask_labels)
        super().__init__(keys, cropper=cropper, allow_missing_keys=allow_missing_keys)
        self.source_key = source_key if source_key is not None else self.keys[0]
        self.mask_key = mask_key

    @property
    def requires_current_data(self) -> bool:
        """As for `CropBody`."""
        return True

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        """Crop every key of a copy of `data`."""
        d = dict(data)
        mask = None if self.mask_key is None else d[self.mask_key]
        box = self.cropper.bounding_box(d[self.source_key], mask)
        for key in self.key_iterator(d):
            d[key] = self.cropper.crop(d[key], box, lazy=lazy)
        return d


def _spacing(img: torch.Tensor) -> np.ndarray:
    """Voxel size along X, Y, Z in mm; 1 without an affine."""
    return np.asarray(img.pixdim, dtype=np.float64) if isinstance(img, MetaTensor) else np.ones(3)


def _source(img: torch.Tensor) -> str:
    """What to call the volume in a message."""
    return str(img.meta.get("filename_or_obj", "volume")) if isinstance(img, MetaTensor) else "volume"


def _open_in_plane(mask: torch.Tensor, spacing: np.ndarray) -> torch.Tensor:
    """Open each slice of a mask [Z, Y, X] by a square of about `OPENING` mm: what is thinner vanishes.

    Outside the image counts as body, so that a body cut off by the field of view is not eroded from there.
    """
    radius = [max(round(OPENING / 2 / s), 0) for s in spacing.tolist()]
    kernel = [2 * r + 1 for r in radius]
    padded = F.pad(mask[:, None].float(), (radius[1], radius[1], radius[0], radius[0]), value=1.0)
    eroded = -F.max_pool2d(-padded, kernel, stride=1)
    return F.max_pool2d(eroded, kernel, stride=1, padding=radius)[:, 0] > 0
