# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""BN over the batches of all processes on a CPU, which torch's SyncBatchNorm does not know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from workflow.gather import sum_over_ranks

__all__ = ["CPUSyncBatchNorm", "convert_cpu_sync_batchnorm"]


class CPUSyncBatchNorm(_BatchNorm):
    """The BN layer that `layer` would be on the batches of all processes, put one after another.

    Mean and variance are taken in two steps: a sum of squares would cancel in float32. In evaluation it is plain BN.

    Args:
        layer: whose parameters and running statistics it shares, and whose activation (timm's BN layers have one).
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.drop, self.act = getattr(layer, "drop", nn.Identity()), getattr(layer, "act", nn.Identity())
        self.training = layer.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        normal = self._over_ranks(x) if self.training else super().forward(x)
        return self.act(self.drop(normal))

    def _over_ranks(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        own = x.new_full((1,), x.numel() / x.shape[1])
        *_, number = total = sum_over_ranks(torch.cat([x.sum(axes), own]))
        if number < 2:
            raise ValueError(f"expected more than 1 value per channel when training, got {tuple(x.shape)} in all")
        mean = total[:-1] / number
        deviation = x - mean.view(shape)
        variance = sum_over_ranks(deviation.square().sum(axes)) / number
        if self.track_running_stats:
            self._track(mean.detach(), (variance * number / (number - 1)).detach())
        normal = deviation * torch.rsqrt(variance + self.eps).view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def convert_cpu_sync_batchnorm(module: nn.Module) -> nn.Module:
    """The module with `CPUSyncBatchNorm` in place of each BN layer; parameters and their names stay."""
    for name, child in module.named_children():
        module.add_module(name, convert_cpu_sync_batchnorm(child))
    return CPUSyncBatchNorm(module) if isinstance(module, _BatchNorm) else module
