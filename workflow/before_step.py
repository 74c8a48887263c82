# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The state before a step of the optimizer, for a run that has to be stopped in the middle of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .progress import ScalerState

__all__ = ["StateBeforeStep"]


class StateBeforeStep:
    """Remembers of a run's state only what changes before the optimizer steps, as this is done at each step: the
    buffers (running statistics of BN) with each forward pass, learning rates, sums, position and random generators.
    Parameters, moments and the gradient scaler change in the step itself, and can be read until then.

    Args:
        everything: what a checkpoint holds, by name.
    """

    def __init__(self, everything: Mapping[str, Any]) -> None:
        self.everything = everything
        lasting = (nn.Module, Optimizer, ScalerState)
        self.changing = {name: thing for name, thing in everything.items() if not isinstance(thing, lasting)}
        self.optimizers = {name: thing for name, thing in everything.items() if isinstance(thing, Optimizer)}
        self.buffers: dict[str, dict[str, Tensor]] = {}
        for name, thing in everything.items():
            if isinstance(thing, nn.Module):
                saved = thing.state_dict().keys()
                self.buffers[name] = {key: buffer for key, buffer in thing.named_buffers() if key in saved}
        self._states: dict[str, Any] | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._rates: dict[str, list[dict[str, Any]]] = {}

    def remember(self) -> None:
        self._states = {name: thing.state_dict() for name, thing in self.changing.items()}
        self._buffers = {
            name: {key: buffer.clone() for key, buffer in buffers.items()} for name, buffers in self.buffers.items()
        }
        self._rates = {
            name: [{key: value for key, value in group.items() if key != "params"} for group in thing.param_groups]
            for name, thing in self.optimizers.items()
        }

    def content(self) -> dict[str, Any] | None:
        """What a checkpoint before the step holds; None where there was none."""
        if self._states is None:
            return None
        content = {name: thing.state_dict() for name, thing in self.everything.items()} | self._states
        for name, buffers in self._buffers.items():
            content[name].update(buffers)
        for name, groups in self._rates.items():
            for group, own in zip(content[name]["param_groups"], groups, strict=True):
                group.update(own)
        return content
