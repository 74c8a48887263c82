# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoCo network: a student and its moving average, each a CNN over the slices of a crop and a projector.

2D-VoCo (Chiu, Chen; arXiv 2601.14593): features of each slice -> mean over the slices of the crop -> projector.
3D VoCo (Wu, Zhuang, Chen; CVPR 2024) is the same network with a 3D backbone and one "slice".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

__all__ = ["CropEncoder", "VoCoNetwork"]


def projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear; BN without affine parameters, over the crops of the batch."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden, affine=False),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden, affine=False),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
    )


class CropEncoder(nn.Module):
    """Crops of slices -> embeddings, ``[B, N, S, C, *spatial] -> [B, N, D]``.

    Args:
        backbone: ``[M, C, *spatial] -> [M, F]`` with ``num_features`` F.
        hidden, out: widths of the projector (paper: 2048 each).
        num_features: F, for a backbone that does not say.
    """

    def __init__(
        self, backbone: nn.Module, hidden: int = 2048, out: int = 2048, num_features: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector(num_features or backbone.num_features, hidden, out)

    def slice_features(self, crops: Tensor) -> Tensor:
        """[B, N, S, C, *spatial] -> [B, N, S, F], one forward pass for all slices of all crops."""
        return self.backbone(crops.flatten(0, 2)).unflatten(0, crops.shape[:3])

    def project(self, features: Tensor) -> Tensor:
        """[B, N, S, F] -> [B, N, D]: mean over the slices, then the projector, whose BN acts over the crops [B*N,
        C]."""
        pooled = features.mean(dim=2)
        return self.projector(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])

    def forward(self, crops: Tensor) -> Tensor:
        return self.project(self.slice_features(crops))


class VoCoNetwork(nn.Module):
    """Student and teacher embeddings of the same crops, ``[B, R+K, S, C, *spatial]`` (random crops first, then base
    crops).

    The teacher is an `AveragedModel` of the *whole* student (CNN and projector): it starts as a copy, takes no gradient
    and moves only when `teacher.TeacherUpdate` moves it. Policy for its BN: in training it normalises by the statistics
    of the batch, as the student does; its running statistics are the student's, copied at each move, and its own
    forward passes never change them. In evaluation both use running statistics.

    Args:
        backbone, hidden, out, num_features: see `CropEncoder`.
        average: ``multi_avg_fn`` of the `AveragedModel`, such as `teacher.MomentumAverage`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int = 2048,
        out: int = 2048,
        num_features: int | None = None,
        average: Callable | None = None,
    ) -> None:
        super().__init__()
        self.student = CropEncoder(backbone, hidden, out, num_features)
        self.teacher = AveragedModel(self.student, multi_avg_fn=average)
        # AveragedModel copies the student at its first update; it is a copy already, so that update must obey the
        # momentum
        self.teacher.n_averaged.fill_(1)
        self.teacher.requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.0  # a forward pass adds nothing to the running statistics
        self.train(self.training)

    def train(self, mode: bool = True) -> VoCoNetwork:
        super().train(mode)
        self.teacher.eval()  # no dropout, no stochastic depth ...
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)  # ... but the batch's statistics
        return self

    def restart_teacher(self) -> None:
        """Make the teacher a copy of the student again, for a student whose weights were loaded."""
        self.teacher.module.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    def move_teacher(self) -> None:
        self.teacher.update_parameters(self.student)

    def forward(self, crops: Tensor) -> dict[str, Tensor]:
        """Embeddings ``{"student": [B, R+K, D], "teacher": [B, R+K, D]}``; no graph is built for the teacher.

        In evaluation also ``slices`` [B, S, F], the student's features of each slice (mean over its crops), for probes.
        """
        with torch.no_grad():
            teacher = self.teacher(crops)
        features = self.student.slice_features(crops)
        embeddings = {"student": self.student.project(features), "teacher": teacher}
        if not self.training:
            embeddings["slices"] = features.mean(dim=1)
        return embeddings
