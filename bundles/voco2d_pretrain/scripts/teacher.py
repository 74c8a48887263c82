# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How the teacher follows the student: once after each optimizer step, by a momentum that is a pure function of the
step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from ignite.engine import Engine
from torch import Tensor
from torch.optim import Optimizer
from workflow.weights import WeightsLoader

from .network import VoCoNetwork

__all__ = ["MomentumAverage", "StudentWeights", "TeacherUpdate"]


class MomentumAverage:
    """``teacher <- m * teacher + (1 - m) * student``, m rising by a half cosine from `start` to `end` over
    `total_steps`.

    The step is what `AveragedModel` counts and stores in its state dict, so a resumed run goes on where it stopped.

    Args:
        momentum: one number for a fixed momentum (the original's is 0.9), or (start, end).
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, momentum: float | Sequence[float], total_steps: int = 1) -> None:
        start, end = (momentum, momentum) if isinstance(momentum, (int, float)) else momentum
        if not 0.0 <= start <= end <= 1.0:
            raise ValueError(f"ema_momentum: expected 0 <= start <= end <= 1, got {momentum}")
        self.start, self.end, self.total_steps = float(start), float(end), max(int(total_steps), 1)

    def at(self, step: int) -> float:
        """Momentum of the update after optimizer step number `step` (from 0)."""
        progress = min(step / self.total_steps, 1.0)
        return self.end - (self.end - self.start) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def __call__(self, teacher: Sequence[Tensor], student: Sequence[Tensor], count: Tensor | int) -> None:
        # the count starts at 1: see VoCoNetwork
        torch._foreach_lerp_(list(teacher), list(student), 1.0 - self.at(int(count) - 1))


class TeacherUpdate:
    """Handler that moves the teacher after each optimizer step, and never else.

    A hook of the optimizer rather than an engine event: an iteration that only accumulates gradients moves nothing, nor
    does a step that the gradient scaler skips, nor any evaluation.
    """

    def __init__(self, network: VoCoNetwork, optimizer: Optimizer) -> None:
        self.network, self.optimizer = network, optimizer

    def attach(self, engine: Engine) -> None:
        self.optimizer.register_step_post_hook(lambda *_: self.network.move_teacher())


class StudentWeights(WeightsLoader):
    """Handler that starts the student's CNN, and so the teacher, from a weights file; None leaves both as initialised.

    Place it before the checkpoints' handler: what a resumed run restores wins.

    Args:
        network: student and teacher.
        path, allow_partial: as in `workflow.weights.load_weights`.
    """

    def __init__(self, network: VoCoNetwork, path: str | None, *, allow_partial: bool = False) -> None:
        super().__init__(path, network.student.backbone, allow_partial=allow_partial)
        self.network = network

    def __call__(self, engine: Engine) -> None:
        super().__call__(engine)
        if self.path is not None:
            self.network.restart_teacher()
