# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Volume -> S axial slices, each of which keeps its place in the patient.

Source: 2D-VoCo (arXiv 2601.14593) takes equally spaced slices of a volume, both in pretraining and in classification.
Neighbouring slices as channels (2.5D) come from the winners of the RSNA 2023 abdominal trauma challenge.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import TransformBackends, ensure_tuple

from .meta import with_meta
from .seeding import SeededInPlace

__all__ = ["ExtractSlices", "ExtractSlicesd", "SliceAffinesd", "slice_affines"]

SliceMode = Literal["equal", "centre", "jitter"]
MODES = ("equal", "centre", "jitter")


def slice_affines(image: MetaTensor) -> torch.Tensor:
    """Voxel-to-world affine of every slice of what `ExtractSlices` returned: [S, 4, 4] float64.

    `affine[k] @ (x, y, 0, 1)` is where pixel (x, y) of slice k lies in the patient (RAS, mm). Exact for unequal steps
    too, and still so after in-plane MONAI transforms (crop, flip, resize), which update `image.affine`.
    """
    if "slice_offsets" not in image.meta:
        raise ValueError('The image has no meta["slice_offsets"]: it does not come from ExtractSlices.')
    affine = torch.as_tensor(image.affine, dtype=torch.float64)
    offsets = torch.as_tensor(image.meta["slice_offsets"], dtype=torch.float64)
    affines = affine.repeat(len(offsets), 1, 1)
    affines[:, :3, 3] += offsets[:, None] * affine[:3, 2]
    return affines


class ExtractSlices(SeededInPlace, Transform):
    """Take S axial slices of a volume, ascending in z.

    Args:
        num_slices: S.
        mode: "equal": the middle slice of each of S equal strata. "centre": the S consecutive central slices.
            "jitter": a random slice of each stratum (training), drawn through `R`; the only random mode.
        neighbours: n slices below and above each slice become channels (2.5D): channel `c * (2n + 1) + n + o` is
            channel c at offset o; beyond the ends the outermost slice is repeated.

    A volume with fewer than S slices repeats slices, so that S always come out: each stratum's nearest slice ("equal",
    "jitter") or the outermost ones ("centre"). `randomize` records `positions` ([S] in [0, 1), the place inside each
    stratum) for "jitter"; set it and call with `randomize=False` to inject them.

    Example::

        >>> ExtractSlices(num_slices=32, neighbours=1)(torch.zeros(1, 192, 192, 64)).shape
        torch.Size([3, 192, 192, 32])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, *, num_slices: int, mode: SliceMode = "equal", neighbours: int = 0) -> None:
        if not isinstance(num_slices, int) or num_slices < 1:
            raise ValueError(f"num_slices must be an integer of at least 1, got {num_slices!r}.")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
        if not isinstance(neighbours, int) or neighbours < 0:
            raise ValueError(f"neighbours must be an integer of at least 0, got {neighbours!r}.")
        self.num_slices = num_slices
        self.mode = mode
        self.neighbours = neighbours
        self.positions = np.full(num_slices, 0.5)

    def randomize(self, data: object = None) -> None:
        """Draw `positions`; only "jitter" draws anything."""
        if self.mode == "jitter":
            self.positions = self.R.random_sample(self.num_slices)

    def slice_indices(self, depth: int) -> np.ndarray:
        """[S] ascending indices into a volume of `depth` slices."""
        if self.mode == "centre":
            start = (depth - self.num_slices) // 2
            return np.clip(start + np.arange(self.num_slices), 0, depth - 1)
        order = np.arange(self.num_slices)
        if self.mode == "equal":
            return (2 * order + 1) * depth // (2 * self.num_slices)
        positions = np.asarray(self.positions, dtype=np.float64)
        if positions.shape != (self.num_slices,) or (positions < 0).any() or (positions >= 1).any():
            raise ValueError(f"positions must be {self.num_slices} numbers in [0, 1), got {positions.tolist()}.")
        # Strata of whole slices: each slice is in one, so that none is drawn twice where there are enough.
        first, end = order * depth // self.num_slices, (order + 1) * depth // self.num_slices
        return first + (positions * (end - first)).astype(np.int64)

    def __call__(self, img: torch.Tensor, randomize: bool = True) -> MetaTensor:
        """Volume [C, X, Y, Z] -> slices [C * (2 * neighbours + 1), X, Y, S] in slice-major memory.

        `affine` takes the mean step between the slices along z; `meta["slice_offsets"]` ([S] float64) holds each
        slice's position in units of that step (see `slice_affines`). The order of x and y in memory is the input's.
        """
        if img.ndim != 4 or 0 in img.shape:
            raise ValueError(f"The volume must be [channels, X, Y, Z] and not empty, got the shape {tuple(img.shape)}.")
        if randomize:
            self.randomize()
        index = self.slice_indices(img.shape[-1])
        volume = img if isinstance(img, MetaTensor) else MetaTensor(img)
        slices = _gather(volume.as_tensor(), index, self.neighbours)
        affine, offsets = _strided_affine(volume.affine, index)
        meta = {**volume.meta, "affine": affine, "slice_offsets": offsets}
        return with_meta(slices, meta, volume.applied_operations)


class ExtractSlicesd(Randomizable, MapTransform):
    """Dictionary version of `ExtractSlices`; all keys get the same slices.

    Args:
        keys: volumes of equal depth, [C, X, Y, Z].
        num_slices, mode, neighbours: see `ExtractSlices`.
    """

    backend = ExtractSlices.backend

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_slices: int,
        mode: SliceMode = "equal",
        neighbours: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.extractor = ExtractSlices(num_slices=num_slices, mode=mode, neighbours=neighbours)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> ExtractSlicesd:
        """Seed the array transform, which draws all that is random; a generator of its own would only take time."""
        self.extractor.set_random_state(seed, state)
        return self

    def randomize(self, data: object = None) -> None:
        """Draw the positions, recorded in `extractor.positions`."""
        self.extractor.randomize(data)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], randomize: bool = True) -> dict[Hashable, torch.Tensor]:
        """Replace each volume by its slices in a copy of `data`."""
        d = dict(data)
        if randomize:
            self.randomize()
        for key in self.key_iterator(d):
            d[key] = self.extractor(d[key], randomize=False)
        return d


class SliceAffinesd(MapTransform):
    """Put the affines of slices beside them as a plain tensor, which outlives a collation that drops meta data.

    Args:
        keys: slices from `ExtractSlicesd`, [C, X, Y, S], after any in-plane transform.
        affine_keys: where the [S, 4, 4] of `slice_affines` goes, one for each of `keys`.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self, keys: KeysCollection, *, affine_keys: KeysCollection = "slice_affine", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.affine_keys = ensure_tuple(affine_keys)
        if len(self.affine_keys) != len(self.keys):
            raise ValueError(f"affine_keys: expected one for each of {self.keys}, got {self.affine_keys}")

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Add the affines to a copy of `data`."""
        d = dict(data)
        for key, affine_key in self.key_iterator(d, self.affine_keys):
            d[affine_key] = slice_affines(d[key])
        return d


def _gather(volume: torch.Tensor, index: np.ndarray, neighbours: int) -> torch.Tensor:
    """[C, X, Y, Z] -> [C * (2n + 1), X, Y, S]; one copy, slice-major, x and y in memory as they were."""
    channels, depth = volume.shape[0], volume.shape[-1]
    around = np.arange(-neighbours, neighbours + 1)
    wanted = torch.from_numpy(np.clip(index[:, None] + around, 0, depth - 1).ravel())
    swap = volume.stride(1) < volume.stride(2)  # x fastest, as LoadSeries lays it out
    planes = volume.permute(3, 0, 2, 1) if swap else volume.permute(3, 0, 1, 2)
    taken = planes.index_select(0, wanted.to(volume.device)).unflatten(
        0, (len(index), len(around))
    )  # [S, 2n+1, C, ...]
    taken = taken.transpose(1, 2).reshape(len(index), channels * len(around), *planes.shape[2:])
    return taken.permute(1, 3, 2, 0) if swap else taken.permute(1, 2, 3, 0)


def _strided_affine(affine: torch.Tensor, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Affine with the mean step of `index` along z and the first slice as origin, and the offsets in that step."""
    affine = torch.as_tensor(affine, dtype=torch.float64).clone()
    span = int(index[-1] - index[0])
    step = span / (len(index) - 1) if span else 1.0  # one slice, or one repeated: keep the affine invertible
    affine[:3, 3] += index[0] * affine[:3, 2]
    affine[:3, 2] *= step
    return affine, torch.from_numpy((index - index[0]) / step)
