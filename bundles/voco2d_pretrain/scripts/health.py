# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Is it learning, or collapsing? Figures on held-out volumes, as MONAI metrics (gathered over processes).

Each is a `CumulativeIterationMetric` for `monai.handlers.IgniteMetricHandler`, fed by `embeddings_and_labels`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import CumulativeIterationMetric
from monai.utils import CommonKeys
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from workflow.gather import in_rank_order

__all__ = ["EmbeddingSpread", "PositionAccuracy", "RecalibrateBN", "SliceHeight", "embeddings_and_labels"]


def embeddings_and_labels(output: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Output transform of the metrics: (embeddings of the network, overlaps [B, R, K])."""
    return output[CommonKeys.PRED], output[CommonKeys.LABEL]


class RecalibrateBN:
    """Handler that sets the running statistics of every BN from one pass over the evaluator's own volumes, before it
    starts.

    A short run's running statistics lag behind its weights, and an untrained network has none: with this both are
    measured alike. It changes the network it is given, so it belongs to evaluation, never to training.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def attach(self, engine: Engine) -> None:
        if self.enabled:
            engine.add_event_handler(Events.STARTED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        layers = [m for m in engine.network.modules() if isinstance(m, _BatchNorm)]
        before = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
        engine.network.train()
        for batch in engine.data_loader:
            inputs, _ = engine.prepare_batch(batch, engine.state.device)
            engine.network(inputs)
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


class _VolumeMean(CumulativeIterationMetric):
    """Mean over volumes of one value each."""

    def aggregate(self) -> Tensor:
        return self.of_all().mean()

    def of_all(self) -> Tensor:
        """What `_compute_tensor` gave, [V, ...], of the volumes of all processes, in the order of the data.

        MONAI's `get_buffer` has another order, and waits for ever where a process has no volume.
        """
        return torch.stack(in_rank_order([value.cpu() for value in self._buffers[0]] if self._buffers else []))

    def _compute_tensor(self, y_pred: dict[str, Tensor], y: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self.of_volumes(y_pred, y)[:, None].float()

    def __call__(self, y_pred: dict[str, Tensor], y: Tensor | None = None, **kwargs: Any) -> Tensor:
        value = self._compute_tensor(y_pred, y)
        self.extend(value)
        return value

    def of_volumes(self, embeddings: dict[str, Tensor], overlap: Tensor) -> Tensor:
        """One value a volume, [B]."""
        raise NotImplementedError


class PositionAccuracy(_VolumeMean):
    """Share of random crops whose most similar base crop (student against teacher) holds the largest overlap.

    Chance is about 1/K; a tie between overlaps counts for either.
    """

    def of_volumes(self, embeddings: dict[str, Tensor], overlap: Tensor) -> Tensor:
        number = overlap.shape[1]
        student = normalize(embeddings["student"][:, :number].float(), dim=-1)
        teacher = normalize(embeddings["teacher"][:, number:].float(), dim=-1)
        nearest = (student @ teacher.mT).argmax(dim=-1, keepdim=True)  # (B, R, 1)
        hit = overlap.gather(-1, nearest).squeeze(-1) >= overlap.amax(dim=-1) - 1e-6
        return hit.float().mean(dim=1)


class EmbeddingSpread(_VolumeMean):
    """One minus the mean cosine between different base crops of a volume: 0 means collapsed, 1 orthogonal on
    average."""

    def of_volumes(self, embeddings: dict[str, Tensor], overlap: Tensor) -> Tensor:
        base = normalize(embeddings["student"][:, overlap.shape[1] :].float(), dim=-1)
        number = base.shape[1]
        total = (base @ base.mT).sum(dim=(1, 2)) - number  # without the diagonal of ones
        return 1.0 - total / (number * (number - 1))


class SliceHeight(_VolumeMean):
    """Error of a k-nearest-neighbour probe that tells a slice's height from its features, between volumes.

    Heights are fractions of the prepared volume (0 lowest slice, 1 highest); each fifth of the volumes is predicted
    from the others. The value is the mean absolute error: 0.25 is what the constant 0.5 scores. NaN with one volume,
    where there is no other to learn from, or one slice (3D crops).

    Args:
        neighbours: k.
    """

    def __init__(self, neighbours: int = 5) -> None:
        super().__init__()
        self.neighbours = neighbours

    def of_volumes(self, embeddings: dict[str, Tensor], overlap: Tensor) -> Tensor:
        return embeddings["slices"]  # (B, S, F): kept whole, the probe needs all volumes

    def _compute_tensor(self, y_pred: dict[str, Tensor], y: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self.of_volumes(y_pred, y).float().cpu()

    def aggregate(self) -> Tensor:
        features = normalize(self.of_all(), dim=-1).numpy()  # (V, S, F)
        volumes, slices = features.shape[:2]
        if volumes < 2 or slices < 2:
            return torch.tensor(float("nan"))
        folds = min(5, volumes)
        smallest = (volumes - math.ceil(volumes / folds)) * slices  # slices to learn from
        height = np.tile(np.linspace(0.0, 1.0, slices), volumes)
        predicted = cross_val_predict(
            KNeighborsRegressor(min(self.neighbours, smallest)),
            features.reshape(volumes * slices, -1),
            height,
            groups=np.repeat(np.arange(volumes), slices),
            cv=GroupKFold(folds),
        )
        return torch.tensor(float(np.abs(predicted - height).mean()))
