# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a run stands and what it goes on with: position in the epoch, random generators, gradient scaler, learning
rate. Each has ``state_dict`` and ``load_state_dict``, of plain types and tensors that ``weights_only=True`` accepts."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel

from .sampler import EpochSampler

__all__ = ["Progress", "RandomState", "ScalerState", "load_optimizer", "load_scheduler", "rescale_averages", "reseed"]

logger = logging.getLogger(__name__)


def reseed(*numbers: int) -> None:
    """Seed the random generators of Python, numpy and torch by all of these numbers together."""
    first, second, third = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002 - the global state is meant
    torch.manual_seed(third)


class RandomState:
    """State of the random generators of Python, numpy and torch."""

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global state is meant
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "python": [version, list(internal), gauss],
            "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])


class ScalerState:
    """The gradient scaler that MONAI's trainer makes when it starts; empty without mixed precision."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, Any]:
        scaler = getattr(self.engine, "scaler", None)
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        scaler = getattr(self.engine, "scaler", None)
        if scaler is not None and state:
            scaler.load_state_dict(dict(state))


class Progress:
    """A run's position, kept so that another number of processes or another batch size may go on from it: completed
    epochs, and how many samples of the unfinished epoch's global order are consumed.

    Ignite itself goes on in an epoch at ``iteration % epoch_length``, but starts the loader anew: the sampler has to
    leave out what was consumed.

    Args:
        engine: trainer. sampler: of its loader; None where the order does not matter.
        accumulation_steps: batches a step of the optimizer; an epoch is gone on with between two steps.
    """

    def __init__(self, engine: Engine, sampler: EpochSampler | None, accumulation_steps: int = 1) -> None:
        self.engine, self.sampler, self.accumulation_steps = engine, sampler, accumulation_steps

    @property
    def samples_per_step(self) -> int:
        """Samples of one iteration, of all processes."""
        if self.sampler is None:
            return 1  # the order does not matter, nothing is left out of it
        batch_size = getattr(self.engine.state.dataloader, "batch_size", None)
        if not isinstance(batch_size, int):
            raise ValueError(f"the trainer's loader: expected one with a batch_size, found {batch_size!r}")
        return batch_size * self.sampler.world_size

    @property
    def batches_of_epoch(self) -> int:
        """Iterations of the unfinished epoch; 0 between two epochs."""
        return self.engine.state.iteration % self.engine.state.epoch_length

    def is_between_steps(self) -> bool:
        """Whether no accumulated gradient waits for a step of the optimizer."""
        return self.batches_of_epoch % self.accumulation_steps == 0

    def start_epoch(self) -> None:
        """Tell the sampler its epoch, and what of it was consumed before the run was interrupted."""
        if self.sampler is not None:
            skip = self.batches_of_epoch * self.samples_per_step
            self.sampler.set_epoch(self.engine.state.epoch - 1, skip=skip)

    def state_dict(self) -> dict[str, int | None]:
        state = self.engine.state
        return {
            "iteration": state.iteration,
            "epoch_length": state.epoch_length,
            "epochs": state.iteration // state.epoch_length,
            "samples": self.batches_of_epoch * self.samples_per_step,
            "samples_per_step": self.samples_per_step,
            "items": None if self.sampler is None else self.sampler.num_items,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        samples, items = saved["samples"], None if self.sampler is None else self.sampler.num_items
        if samples and items != saved["items"]:
            logger.warning("resume: there are %s items, there were %s: epoch %d starts again from its beginning", items,
                           saved["items"], saved["epochs"] + 1)  # fmt: skip
            samples = 0
        per_step, length = self.samples_per_step, self.engine.state.epoch_length
        steps, again = divmod(samples, per_step * self.accumulation_steps)
        if again:
            logger.warning("resume: the last %d of %d samples of epoch %d come again: a step has %d samples now", again,
                           samples, saved["epochs"] + 1, per_step * self.accumulation_steps)  # fmt: skip
        self.engine.state.epoch = saved["epochs"]
        self.engine.state.iteration = saved["epochs"] * length + steps * self.accumulation_steps
        if (per_step, length) != (saved["samples_per_step"], saved["epoch_length"]):
            logger.warning(
                "resume: an epoch has %d iterations of %d samples, it had %d of %d: iteration %d is now %d",
                length, per_step, saved["epoch_length"], saved["samples_per_step"], saved["iteration"],
                self.engine.state.iteration,
            )  # fmt: skip


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Moments and steps from the checkpoint; learning rate, weight decay and the like from the config, so that a run
    may go on with others. What is another is logged."""
    scheduled = any("initial_lr" in group for group in optimizer.param_groups)
    passed_over = {"params", "lr"} if scheduled else {"params"}  # the scheduler sets lr
    configured = [{k: v for k, v in group.items() if k not in passed_over} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        for name, value in own.items():
            _log_change(f"optimizer: {name}", value, group.get(name))
            group[name] = value


def load_scheduler(scheduler: LRScheduler, state: Mapping[str, Any], before: int, iteration: int) -> None:
    """Only the step of a schedule that is a function of the step; its length and rates are the config's, so that a
    longer run, or one of other batches, has the schedule that it would have had.

    Args:
        scheduler, state: and what the checkpoint has of it.
        before, iteration: the run's iteration when it was saved, and where it goes on.
    """
    if not isinstance(scheduler, LambdaLR):
        scheduler.load_state_dict(dict(state))
        return
    for name, value in vars(scheduler).items():
        if isinstance(value, (int, float)) and name in state and not name.startswith("_") and name != "last_epoch":
            _log_change(f"lr_scheduler: {name}", value, state[name])
    # one that counts epochs has another number than the iteration, and keeps it
    step = iteration if state["last_epoch"] == before else state["last_epoch"]
    scheduler.last_epoch, scheduler._step_count = step - 1, state["_step_count"] + 1  # not the first of all steps
    scheduler.step()
    scheduler._step_count = state["_step_count"] + step - state["last_epoch"]


def rescale_averages(module: nn.Module, before: int, iteration: int) -> None:
    """A moving average whose momentum depends on its count of steps: the same share of the run as before."""
    for part in module.modules():
        if isinstance(part, AveragedModel) and before:
            part.n_averaged.copy_(1 + torch.round((part.n_averaged - 1) * iteration / before))


def _log_change(name: str, value: Any, saved: Any) -> None:
    if value != saved:
        logger.warning("resume: %s is %s, it was %s", name, value, saved)
