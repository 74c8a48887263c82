# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What pretraining and fine-tuning share: batches of indices, slices of a volume, and the descent itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transforms.slices import ExtractSlices


def index_batches(number: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` batches of indices below `number`, from one shuffled round after the other."""
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(number)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch


def equal_slices(depth: int, num_slices: int) -> np.ndarray:
    """Indices of the slices that evaluation sees."""
    return ExtractSlices(num_slices=num_slices, mode="equal").slice_indices(depth)


def as_input(volumes: np.ndarray) -> Tensor:
    """[..., X, Y] uint8 -> float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(volumes)).float().div_(255.0)


def descend(
    parameters: Sequence[nn.Parameter],
    losses: Iterator[Tensor],
    steps: int,
    settings: Mapping[str, Any],
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """AdamW with warm-up, cosine and clipped gradients, as the bundles train.

    Args:
        parameters: to train.
        losses: gives the loss of each step.
        steps: how many.
        settings: learning_rate, weight_decay, amsgrad, warmup_fraction and grad_clip.
        after_step: called after each step.

    Returns:
        The loss of each step.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(
        parameters, settings["learning_rate"], weight_decay=settings["weight_decay"], amsgrad=settings["amsgrad"]
    )
    warmup = int(settings["warmup_fraction"] * steps)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=warmup, t_total=steps, warmup_multiplier=0.01)
    history = []
    for loss in losses:
        history.append(loss.item())
        if not math.isfinite(history[-1]):
            raise FloatingPointError(f"the loss is {history[-1]} at step {len(history)} of {steps}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings["grad_clip"])
        optimizer.step()
        schedule.step()
        after_step()
    return history


@torch.no_grad()
def recalibrate(backbone: nn.Module, volumes: np.ndarray, num_slices: int, batch_size: int = 8) -> None:
    """Running statistics of every BN anew, the plain mean over batches of whole slices of `volumes` [N, Z, X, Y]."""
    layers = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    backbone.train()
    slices = equal_slices(volumes.shape[1], num_slices)
    for start in range(0, len(volumes), batch_size):
        backbone(as_input(volumes[start : start + batch_size, slices]).flatten(0, 1)[:, None])
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum


@torch.no_grad()
def slice_features(backbone: nn.Module, volumes: np.ndarray, slices: np.ndarray, batch_size: int = 8) -> Tensor:
    """[N, Z, X, Y] -> [N, S, F] features of whole slices."""
    backbone.eval()
    parts = []
    for start in range(0, len(volumes), batch_size):
        images = as_input(volumes[start : start + batch_size, slices])
        parts.append(backbone(images.flatten(0, 1)[:, None]).unflatten(0, images.shape[:2]))
    return torch.cat(parts)
