# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""TensorBoard: one writer for all handlers of a run, its learning rates, and its settings beside its final figures."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from .manifest import plain_numbers

__all__ = ["HyperParameters", "LazyWriter", "LearningRates"]


class LazyWriter:
    """A `SummaryWriter` that makes its folder at the first value and not before: building a workflow, or a run that is
    refused, leaves nothing behind.

    Args:
        log_dir: TensorBoard's folder.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_log_dir", "_writer"):  # what copy and pickle ask for
            raise AttributeError(name)
        if self._writer is None:
            self._writer = SummaryWriter(self._log_dir)
        return getattr(self._writer, name)


class LearningRates:
    """Trainer handler: the learning rate of each parameter group at each iteration, as ``lr/group_0``..."""

    def __init__(self, writer: LazyWriter, optimizer: Optimizer) -> None:
        self.writer, self.optimizer = writer, optimizer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            self.writer.add_scalar(f"lr/group_{number}", group["lr"], engine.state.iteration)


class HyperParameters:
    """Trainer handler: when training is done, the run's settings and final figures for TensorBoard's HPARAMS page.

    Place it after `RunRecord` and the validation.

    Args:
        run_folder: knows the settings and the figures. writer: where to.
    """

    def __init__(self, run_folder: Any, writer: LazyWriter) -> None:
        self.run_folder, self.writer = run_folder, writer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        figures = {**self.run_folder.metrics, **plain_numbers(engine.state.metrics)}
        final = {f"final/{name}": value for name, value in figures.items() if value is not None}
        # "." keeps it in the run's own folder: TensorBoard shows one run, with its curves
        self.writer.add_hparams(self.run_folder.settings(), final, run_name=".")
        self.writer.flush()
