# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The optional auxiliary loss on slices: network, loss and batch of training with slice labels.

Each function gives back what training without slice labels uses where the weight is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.engines.utils import default_prepare_batch
from torch import Tensor, nn
from torch.nn import functional

from .loss import InjuryLoss
from .network import CNNLSTM

__all__ = ["InjurySliceLoss", "SeriesAndSlices", "training_batch", "training_loss", "training_network"]


class SeriesAndSlices(nn.Module):
    """The network as it is trained: logits of the series and of its slices, from one pass of the backbone.

    In evaluation it is the network itself. It owns no parameters: weights are saved from the network.
    """

    def __init__(self, network: CNNLSTM) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W, S] -> [B, L], and in training also [B, S, L]."""
        return self.network.series_and_slices(x) if self.training else self.network(x)


class InjurySliceLoss(nn.Module):
    """The loss of the series plus a weighted, masked binary cross-entropy of its slices.

    For slice logits z and slice labels y of group g, slice s, item b::

        L = InjuryLoss + weight * sum_g 1/(B S) * sum_bs [y_bsg is known] * w_g(y_bsg) * BCE(z_bsg, y_bsg)

    with the ``loss_weight`` w of the table's class. As in `InjuryLoss` the sum is divided by all slices, not by the
    known ones, so that accumulated and distributed batches add up to the large one.

    Args:
        loss: of the series.
        weight: of the slices, above 0.

    Attributes:
        last_terms: those of `loss`, and ``slices``, not yet weighted; detached.
    """

    def __init__(self, loss: InjuryLoss, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight
        table = loss.table
        if not table.slice_groups:
            raise ValueError(f"no group has slice labels (image_level_name): {', '.join(table.group_names)}")
        self.logits = [table.logit_slices[name].start for name in table.slice_groups]  # one logit each
        self.rows = [table.group_names.index(name) for name in table.slice_groups]
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            predicted: logits of the series [B, L] and of the slices [B, S, L].
            target: classes of the series [B, G], and labels of the slices [B, S, K]: 1, 0, or -1 where unknown, with
                the K groups of ``LabelTable.slice_groups``.

        Returns:
            Scalar tensor.
        """
        series = self.loss(predicted[0], target[0])
        slices = self.slice_term(predicted[1], target[1])
        self.last_terms = {**self.loss.last_terms, "slices": slices.detach()}
        return series + self.weight * slices

    def slice_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The part of the slices, not yet weighted; arguments as in :meth:`forward`."""
        if labels.shape != (*logits.shape[:2], len(self.rows)):
            raise ValueError(
                f"expected slice labels {(*logits.shape[:2], len(self.rows))} (batch, slices, groups), got"
                f" {tuple(labels.shape)}"
            )
        z = logits[:, :, self.logits]
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        known = labels >= 0
        y = labels.clamp(min=0).to(z.dtype)
        classes = self.loss.weights.to(z.dtype)[self.rows]  # (K, classes)
        weights = torch.where(y > 0, classes[:, 1], classes[:, 0]) * known
        losses = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        return (losses * weights).mean(dim=(0, 1)).sum()


def training_loss(loss: InjuryLoss, weight: float) -> nn.Module:
    """`loss`, with the term of the slices where `weight` is above 0.

    Raises:
        ValueError: the weight is negative or no finite number.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"slice_loss_weight: expected a number of at least 0, got {weight!r}")
    return InjurySliceLoss(loss, weight) if weight else loss


def training_network(network: CNNLSTM, weight: float, device: torch.device | None = None) -> nn.Module:
    """The network that is trained, on `device` if given; with slice logits where `weight` is above 0."""
    module = SeriesAndSlices(network) if weight else network
    return module if device is None else module.to(device)


def training_batch(weight: float) -> Callable[..., Any]:
    """MONAI's ``prepare_batch``; where `weight` is above 0 the target is (label, slice_label)."""
    return _with_slice_labels if weight else default_prepare_batch


def _with_slice_labels(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    image, label = default_prepare_batch(batch, device, non_blocking, **kwargs)
    return image, (label, batch["slice_label"].to(device=device, non_blocking=non_blocking, **kwargs))
