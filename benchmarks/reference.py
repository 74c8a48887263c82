# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the original 2D-VoCo does, in plain MONAI and PyTorch: the baseline that the speed benchmark measures against.

Written from the papers' description (Wu, Zhuang, Chen, CVPR 2024, arXiv 2402.17300; Chiu, Chen, arXiv 2601.14593) and a
list of what the original's code does; nothing is copied. Kept are the defects that cost time or memory, because they
are what is measured: a float chain that runs at every step, crops cut one by one, loops over volumes and pairs in the
loss, a teacher whose forward builds a graph, and its moving average as a loop over parameters within ``forward``. Not
kept are those that change results alone (BN over the wrong axis, a projector that is never averaged): with them gone
the numbers are those of our own parts, which `tests/benchmarks/test_reference.py` holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    LoadImaged,
    Orientationd,
    Randomizable,
    Resized,
    ScaleIntensityRanged,
    SpatialCrop,
    Transform,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, relu

__all__ = ["Crops", "EqualSlices", "VoCo", "data_chain", "overlap_by_loops", "preparation", "voco_loss"]

WINDOW = (-175.0, 250.0)  # HU
FOREGROUND = 0.3  # of the window
MOMENTUM = 0.9
EPS = 1e-6


def _is_foreground(image: Tensor) -> Tensor:
    return image > FOREGROUND


def preparation(volume_size: Sequence[int], key: str = "image") -> Compose:
    """NIfTI path -> windowed, oriented, cropped and resized float volume [1, X, Y, Z] in [0, 1]."""
    return Compose([
        LoadImaged(key, reader="NibabelReader", image_only=True, ensure_channel_first=True),
        ScaleIntensityRanged(key, a_min=WINDOW[0], a_max=WINDOW[1], b_min=0.0, b_max=1.0, clip=True),
        Orientationd(key, axcodes="RAS", labels=None),
        CropForegroundd(key, source_key=key, select_fn=_is_foreground, allow_smaller=True),
        Resized(key, spatial_size=tuple(volume_size), mode="trilinear"),
    ])  # fmt: skip


class EqualSlices(Transform):
    """Take `num_slices` equally spaced slices: [1, X, Y, Z] -> [1, X, Y, S], the slices still last in memory."""

    def __init__(self, num_slices: int, key: str = "image") -> None:
        self.num_slices, self.key = num_slices, key

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        volume = data[self.key]
        index = [(2 * k + 1) * volume.shape[-1] // (2 * self.num_slices) for k in range(self.num_slices)]
        return {**data, self.key: volume[..., index]}


def overlap_by_loops(windows: Sequence[Sequence[int]], grid: Sequence[int], crop: Sequence[int]) -> Tensor:
    """Share of each window that lies in each base crop, [R, K] float32: pair by pair, axis by axis."""
    labels = torch.zeros(len(windows), int(np.prod(grid)))
    for r, window in enumerate(windows):
        for k, cell in enumerate(np.ndindex(*grid)):
            area = 1.0
            for start, number, size in zip(window, cell, crop, strict=True):
                end = min(start + size, (number + 1) * size)
                area *= max(end - max(start, number * size), 0)
            labels[r, k] = area / float(np.prod(crop))
    return labels


class Crops(Randomizable, Transform):
    """Cut random and base crops with MONAI's `SpatialCrop`, one after the other, each a float copy.

    Args:
        grid, crop: base crops along x and y, and pixels of a crop.
        num_random_crops: R.

    Defects kept for the measurement: a transform object and its bookkeeping for every crop, copies out of memory whose
    fastest axis is z, labels by loops.
    """

    def __init__(self, grid: Sequence[int], crop: Sequence[int], num_random_crops: int = 2, key: str = "image") -> None:
        self.grid, self.size, self.number, self.key = tuple(grid), tuple(crop), num_random_crops, key
        self.windows: list[list[int]] = []

    def randomize(self, spatial: Sequence[int]) -> None:
        """Draw `windows`, uniform over all that lie inside the slice."""
        ends = np.subtract(spatial, self.size) + 1
        self.windows = [[int(self.R.randint(end)) for end in ends] for _ in range(self.number)]

    def cut(self, slices: Tensor, start: Sequence[int]) -> Tensor:
        """[1, X, Y, S] -> [S, 1, *crop] float32."""
        end = [s + c for s, c in zip(start, self.size, strict=True)]
        cropper = SpatialCrop(roi_start=[*start, 0], roi_end=[*end, slices.shape[-1]])
        return torch.as_tensor(cropper(slices)).permute(3, 0, 1, 2).float().contiguous()

    def __call__(self, data: Mapping[str, Any], randomize: bool = True) -> dict[str, Any]:
        """Add ``crops`` [R+K, S, 1, *crop], random ones first, and ``overlap`` [R, K]."""
        slices = data[self.key]
        if randomize:
            self.randomize(slices.shape[1:3])
        base = [[n * c for n, c in zip(cell, self.size, strict=True)] for cell in np.ndindex(*self.grid)]
        crops = [self.cut(slices, start) for start in (*self.windows, *base)]
        overlap = overlap_by_loops(self.windows, self.grid, self.size)
        return {"crops": torch.stack([torch.Tensor(crop) for crop in crops]), "overlap": overlap}


def data_chain(
    volume_size: Sequence[int], num_slices: int, grid: Sequence[int], crop: Sequence[int], num_random_crops: int = 2
) -> Compose:
    """NIfTI path -> crops and labels, all of it at every step."""
    steps = [EqualSlices(num_slices), Crops(grid, crop, num_random_crops)]
    return Compose([*preparation(volume_size).transforms, *steps])


def _position_loss(labels: Tensor, similarity: Tensor) -> Tensor:
    """The published position loss of one volume, [R, K] -> scalar."""
    positive = -(labels * torch.log(1 - (labels - similarity).abs() + EPS)).sum() / (labels.sum() + EPS)
    empty = (labels == 0).float()
    return positive + (empty * similarity**2).sum() / (empty.sum() + EPS)


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """[R, D] and [K, D] -> cosines clamped to [0, 1], [R, K]."""
    return cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1).clamp(0.0, 1.0)


def voco_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Form v2 of the VoCo loss by loops over volumes and pairs.

    Args:
        student, teacher: embeddings [B, R+K, D], random crops first.
        labels: overlaps [B, R, K].

    Defects kept for the measurement: the loops; a gradient into the teacher, which the published intra term does not
    stop; at batch 1 the "other" volume is the same one. The one-sided regulariser and the hard clamp are as published.
    """
    total = student.new_zeros(())
    batch, number, base = labels.shape
    for b in range(batch):
        other = (b + 1) % batch
        random_s, base_s = student[b, :number], student[b, number:]
        intra = _position_loss(labels[b], _similarity(random_s, teacher[b, number:]))
        target = _similarity(teacher[b, :number], teacher[other, number:]).detach()
        inter = _position_loss(target, _similarity(random_s, student[other, number:]))
        pairs = student.new_zeros(())
        for i in range(base):
            for j in range(i + 1, base):
                pairs = pairs + relu(cosine_similarity(base_s[i], base_s[j].detach(), dim=0)) ** 2
        total = total + intra + inter + pairs / (base * (base - 1) / 2)
    return total / batch


class Encoder(nn.Module):
    """Crops [B, N, S, 1, *crop] -> embeddings [B, N, D]: CNN, mean over slices, projector; contiguous float32."""

    def __init__(self, name: str, hidden: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=False, in_chans=1, num_classes=0)
        width = self.backbone.num_features
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden, affine=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden, affine=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
        )  # fmt: skip

    def forward(self, crops: Tensor) -> Tensor:
        batch, number, slices = crops.shape[:3]
        features = self.backbone(crops.flatten(0, 2)).view(batch * number, slices, -1).mean(dim=1)
        return self.projector(features).view(batch, number, -1)


class VoCo(nn.Module):
    """Student, teacher and loss in the original's structure, ``(crops, labels) -> loss``.

    Args:
        name: of a timm model.
        hidden: width of the projector.
        teacher_gradient: the loss differentiates the teacher too, as the original trains its teacher's projector; False
            stops at the teacher's embeddings, whose graph is built and kept all the same.

    Defects kept for the measurement: the teacher's graph, and the moving average within ``forward``, as a loop.
    """

    def __init__(self, name: str = "efficientnet_b0", hidden: int = 2048, *, teacher_gradient: bool = True) -> None:
        super().__init__()
        self.student = Encoder(name, hidden)
        self.teacher = copy.deepcopy(self.student)
        self.teacher_gradient = teacher_gradient

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Exponential moving average, parameter by parameter."""
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.data = teacher.data * MOMENTUM + student.data * (1.0 - MOMENTUM)

    def forward(self, crops: Tensor, labels: Tensor) -> Tensor:
        self.move_teacher()
        student, teacher = self.student(crops), self.teacher(crops)
        # `teacher`, and so its graph, lives until this returns: after the student's is built
        return voco_loss(student, teacher if self.teacher_gradient else teacher.detach(), labels)
