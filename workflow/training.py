# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Pieces of training that MONAI's engines leave open: gradient clipping at each optimizer step, a stop at a loss that
is no number, a validation after the last epoch too, parameter groups, logged values."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping as IgniteEarlyStopping
from monai.engines import IterationEvents
from monai.handlers import ValidationHandler
from monai.utils import CommonKeys
from torch import nn
from torch.optim import Optimizer

from .errors import NonFiniteError
from .gather import of_each, ranks, sum_over_ranks

__all__ = [
    "EarlyStopping",
    "GradientClipping",
    "LossMeans",
    "StopAtNonFiniteLoss",
    "Validation",
    "parameter_groups",
    "shared_handler",
]

logger = logging.getLogger(__name__)


class GradientClipping:
    """Handler that clips the norm of all gradients right before each optimizer step.

    A hook of the optimizer, not an engine event: with accumulated gradients there is a step only every few iterations,
    and with mixed precision the gradients are unscaled by then.

    Args:
        optimizer: whose parameters to clip.
        max_norm: None or 0 for no clipping.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float | None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def attach(self, engine: Engine) -> None:
        if self.max_norm:
            self.optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if torch.isfinite(norm):  # else the factor is 0 or NaN, and the check of the gradients would see what it made
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)


class StopAtNonFiniteLoss:
    """Handler that ends the run at a NaN or infinite loss, before the step that would spoil the weights; in all
    processes when it is that of one. `Checkpoints` then leaves a checkpoint of the state before that step.

    Args:
        optimizer: also end it at a gradient that is no number (of a finite loss, such as a square root at 0). With
            mixed precision's gradient scaler such a step is skipped and the scale lowered instead, as it is meant to.

    Raises:
        NonFiniteError: naming the iteration and the batch's series; of several processes all series of the step, as
            BN over all batches spreads a NaN, first those whose own input is not finite.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.optimizer = optimizer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        if self.optimizer is not None:
            self.optimizer.register_step_pre_hook(lambda *_: self._check_gradients(engine))

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output[CommonKeys.LOSS].detach()
        if sum_over_ranks((~torch.isfinite(loss)).any().float()):
            bad = [value for value in of_each(loss.item()) if not math.isfinite(value)]
            self._stop(engine, f"the loss is {bad[0]}")

    def _check_gradients(self, engine: Engine) -> None:
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._stop(engine, f"the norm of the gradient is {norm.item()} (the loss is finite)")

    @staticmethod
    def _stop(engine: Engine, what: str) -> NoReturn:
        batch = engine.state.batch if isinstance(engine.state.batch, dict) else {}
        series = batch.get("series_id", "unknown")
        where = f"at iteration {engine.state.iteration} (epoch {engine.state.epoch})"
        if ranks()[1] == 1:
            raise NonFiniteError(f"{what} {where}, series {series}")
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        shares = of_each((finite, [series] if isinstance(series, str) else list(series)))
        first = [name for finite, names in shares if not finite for name in names]
        others = [name for finite, names in shares if finite for name in names]
        told = f"; their input is not finite: {first}" if first else ""
        raise NonFiniteError(f"{what} {where}, one of the series of this step: {first + others}{told}")


class Validation(ValidationHandler):
    """MONAI's `ValidationHandler` by epochs, and once more after the last epoch where `interval` does not end there:
    otherwise the last epochs could not become the best, and a short run would end without weights.

    A process of a distributed run that has no item to validate still takes part: the figures are gathered."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def __call__(self, engine: Engine) -> None:
        state = self.validator.state
        if state.epoch_length != 0:
            super().__call__(engine)
            return
        # MONAI would pass over the whole run, and the other processes would wait in vain
        state.epoch = state.max_epochs = engine.state.epoch
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
            self.validator.fire_event(event)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs


def shared_handler(handler: Any) -> Any:
    """A handler that the config refers to in two places: MONAI wants every item of a list of handlers to be a
    component."""
    return handler


class EarlyStopping:
    """Trainer handler around Ignite's: stops when the validator's metric has not risen for some validations.

    Args:
        validator: evaluator that has the metric. metric: its name, the greater the better.
        patience: validations to wait; None for no early stopping.
    """

    def __init__(self, validator: Engine, metric: str, patience: int | None) -> None:
        self.validator, self.metric, self.patience = validator, metric, patience
        self.stopper: IgniteEarlyStopping | None = None

    def attach(self, engine: Engine) -> None:
        if self.patience is not None:
            self.stopper = IgniteEarlyStopping(self.patience, self._score, engine)
            self.validator.add_event_handler(Events.COMPLETED, self.stopper)
            self.trainer = engine

    def _score(self, validator: Engine) -> float:
        value = float(validator.state.metrics[self.metric])
        return -math.inf if math.isnan(value) else value  # nothing compares with a NaN: it would be the best for ever

    def state_dict(self) -> dict[str, Any]:
        return dict(self.stopper.state_dict()) if self.stopper is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.stopper is not None and state:
            self.stopper.load_state_dict(state)
            if self.stopper.counter >= self.patience:
                logger.info("nothing left to do: %s had not risen for %d validations", self.metric, self.patience)
                self.trainer.terminate()


def parameter_groups(
    network: nn.Module, learning_rate: float, *, part: str = "backbone", part_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameters for the optimizer; those below the attribute `part` get `part_lr` where it is not None.

    Parameters that require no gradient (frozen blocks) are left out.
    """
    slow = {id(p) for p in getattr(network, part).parameters()} if part_lr is not None else set()
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in slow], "lr": learning_rate}]
    if part_lr is not None:
        groups.append({"params": [p for p in trained if id(p) in slow], "lr": part_lr})
    return [group for group in groups if group["params"]]


class LossMeans:
    """Handler that averages the loss and each of its terms over an epoch, logs them and puts them into the engine's
    metrics, from where MONAI's TensorBoard handler takes them. Nothing is read back from a GPU before the epoch ends.
    The mean is over all processes of a distributed run.

    Args:
        loss_function: keeps the detached terms of its last call under ``last_terms``.
    """

    def __init__(self, loss_function: nn.Module) -> None:
        self.loss_function = loss_function
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count, "world_size": ranks()[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
        if self.count and (ranks()[1] > 1 or state.get("world_size") != 1):  # the sums are the first process's own
            self.sums, self.count = {}, 0
            logger.info("the mean losses of an epoch that is gone on with are those since the resume")

    def _reset(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        if not length or engine.state.iteration % length == 0:  # else the run goes on within an epoch
            self.sums, self.count = {}, 0

    def _add(self, engine: Engine) -> None:
        output = engine.state.output
        output = output[0] if isinstance(output, list) else output
        terms = {f"loss_{name}": value for name, value in self.loss_function.last_terms.items()}
        for name, value in {"loss": output[CommonKeys.LOSS].detach(), **terms}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def _report(self, engine: Engine) -> None:
        total = sum_over_ranks(torch.stack(list(self.sums.values()))) / (self.count * ranks()[1])
        means = dict(zip(self.sums, total.tolist(), strict=True))
        engine.state.metrics.update(means)
        logger.info("epoch %d: %s", engine.state.epoch, ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
