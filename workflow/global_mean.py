# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of several processes whose gradient is that of one process with all their items."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .gather import ranks, sum_over_ranks

__all__ = ["GlobalMean"]


class GlobalMean(nn.Module):
    """A loss that is a mean over the items of the batch, weighted by this process's share of all items.

    DistributedDataParallel averages the processes' gradients; that is the gradient of the mean over all items only
    where all have the same number of them, which the last batch of an epoch seldom grants. So the loss of n items among
    N of W processes is multiplied by ``n * W / N``; the mean over the processes is then the mean over the items.

    Args:
        loss: ``(prediction, target) -> scalar``, the mean over the items of a value each. `last_terms` are such means.

    Attributes:
        last_terms: those of `loss`, weighted alike.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, predicted: Any, target: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The weighted loss; the items are counted in the target, or in its first part."""
        value = self.loss(predicted, target)
        number = value.new_full((), len(target if isinstance(target, Tensor) else target[0]))
        share = number * ranks()[1] / sum_over_ranks(number)
        self.last_terms = {name: term * share for name, term in self.loss.last_terms.items()}
        return value * share
