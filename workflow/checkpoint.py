# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Full checkpoints for resuming and the flat ``model.pt``. Both are written under a temporary name, flushed to the disk
and renamed (Ignite's DiskSaver does not flush, and its Checkpoint removes an old file before it writes the new one), so
that a run that is killed while it writes, a full disk or a loss of power leave the last good file."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .before_step import StateBeforeStep
from .checkpoint_files import checksum, is_rescued, is_whole, numbered, save_tensors
from .errors import NonFiniteError
from .gather import barrier, is_first, of_each, of_first, ranks
from .progress import Progress, RandomState, ScalerState, load_optimizer, load_scheduler, rescale_averages, reseed
from .sampler import EpochSampler
from .weights import WeightsError, load_tensors

__all__ = ["Checkpoints", "WeightsSaver"]

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


class Checkpoints:
    """Trainer handler: saves everything that a run needs to go on, and restores it.

    Place it after all other handlers, so that what they did in an iteration or epoch is in the checkpoint. A loss or
    gradient that is no number leaves a checkpoint of the state before that step.

    Args:
        folder: where ``checkpoint_<iteration>.pt`` goes.
        objects: what to save, by name; each has ``state_dict`` and ``load_state_dict``. Position, gradient scaler and
            random generators are added.
        sampler: told the epoch when it starts, and how much of it was consumed before.
        resume: None, a file, or ``latest``: the last one that is whole, or the beginning where there is none yet.
        keep: number of checkpoints kept.
        interval: epochs between two.
        every_steps: steps of the optimizer between two within an epoch; None for none.
        accumulation_steps: batches a step.
    """

    def __init__(
        self,
        folder: str,
        objects: Mapping[str, Any],
        *,
        sampler: EpochSampler | None = None,
        resume: str | None = None,
        keep: int = 2,
        interval: int = 1,
        every_steps: int | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        if every_steps is not None and (not isinstance(every_steps, int) or every_steps < 1):
            raise ValueError(f"save_every_steps: expected a number of steps from 1 on or null, got {every_steps!r}")
        self.folder, self.objects, self.sampler, self.resume = Path(folder), dict(objects), sampler, resume
        self.keep, self.interval, self.every_steps = keep, interval, every_steps
        self.accumulation_steps = accumulation_steps
        self.saved: int | None = None  # iteration of the last checkpoint

    def attach(self, engine: Engine) -> None:
        self.progress = Progress(engine, self.sampler, self.accumulation_steps)
        added = {"progress": self.progress, "scaler": ScalerState(engine), "random": RandomState()}
        self.everything = {**self.objects, **added}
        engine.add_event_handler(Events.STARTED, self._restore)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.progress.start_epoch)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval) | Events.COMPLETED, self._save)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._rescue)
        if self.every_steps is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_within_epoch)

    def _start(self, engine: Engine) -> None:
        self.before = StateBeforeStep(self.everything)

    def _content(self) -> dict[str, Any]:
        return {name: thing.state_dict() for name, thing in self.everything.items()}

    def _save_within_epoch(self, engine: Engine) -> None:
        # the last batch of an epoch is followed by the epoch's own checkpoint, after the validation
        batches = self.progress.batches_of_epoch
        if batches and batches % (self.every_steps * self.accumulation_steps) == 0:
            self._save(engine)

    def _save(self, engine: Engine) -> None:
        if engine.state.iteration != self.saved and is_first():
            self._write(self._content())

    def _write(self, content: Mapping[str, Any]) -> None:
        iteration = content["progress"]["iteration"]
        path = self.folder / f"checkpoint_{iteration}.pt"
        save_tensors(path, content)
        self.saved = iteration
        found = numbered(self.folder)
        kept = [number for number, old in found if not is_rescued(old)][: self.keep]
        for number, old in found:
            if number < kept[-1]:
                old.unlink()

    def _remember(self, engine: Engine) -> None:
        if is_first() and self.progress.is_between_steps():
            self.before.remember()

    def _rescue(self, engine: Engine, error: BaseException) -> None:
        if isinstance(error, NonFiniteError) and not error.rescued:
            message = str(error)
            content = self.before.content()
            if is_first() and content is not None:
                message += self._rescued(content)
            barrier()  # the first process to end would end the others
            rescued = NonFiniteError(message)
            rescued.rescued = True
            raise rescued from error
        raise error

    def _rescued(self, content: Mapping[str, Any]) -> str:
        """Save the state before a bad step, unless it is bad itself; what to say of it. No other file is removed."""
        for part in (name for name, thing in self.everything.items() if isinstance(thing, nn.Module)):
            bad = [name for name, tensor in content[part].items() if not torch.isfinite(tensor).all()]
            if bad:
                return f". The state before that step is not finite already ({part}: {bad[0]}): it is not saved"
        iteration = content["progress"]["iteration"]
        path = self.folder / f"checkpoint_{iteration}.pt"
        if iteration != self.saved:
            path = path.with_suffix(".rescued.pt")
            save_tensors(path, content)
        advice = "--resume latest goes on from it, with a smaller learning_rate or without those series"
        return f". The state before that step is in {path}: {advice}"

    def _find(self) -> Path | None:
        if self.resume is None:
            return None
        if self.resume != "latest":
            path = Path(self.resume)
            load_tensors(path)  # says what else it is
            if not is_whole(path):
                raise WeightsError(f"resume: {path} is damaged: its checksums are not those of its content")
            return path
        found = [path for _, path in numbered(self.folder)]
        for path in found:
            if is_whole(path):
                return path
            logger.warning("resume: %s is damaged, the disk may be too: trying the checkpoint before it", path)
        if found:
            message = f"resume: none of the {len(found)} checkpoints in {self.folder} is whole"
            try:
                load_tensors(found[0])
            except WeightsError as error:  # it says what else it is, such as code
                raise WeightsError(f"{message}: {error}") from error
            raise WeightsError(message)
        logger.warning("resume: no checkpoint in %s yet: the run starts from the beginning", self.folder)
        return None

    def _restore(self, engine: Engine) -> None:
        """The first process chooses the file; all go on from it, and end together where one cannot."""
        path, problem = None, ""
        if is_first():
            path, problem = _attempt(self._find)
        path, problem = of_first((path, problem))
        if problem:
            raise WeightsError(problem)
        if path is not None:
            _, problem = _attempt(lambda: self._read(engine, path))
        self._compare(engine.state.iteration, problem)
        if path is None:
            return
        state = engine.state
        logger.info("resumed from %s: epoch %d, iteration %d", path, state.epoch, state.iteration)
        if state.epoch >= state.max_epochs:
            logger.info("nothing left to do: %d of %d epochs are done", state.epoch, state.max_epochs)
        if is_first():
            self._begin_branch(path, state.iteration)
        else:  # the generators that the checkpoint holds are the first's
            reseed(torch.initial_seed(), ranks()[0], state.iteration)

    def _compare(self, iteration: int, problem: str) -> None:
        """Weights from a file, too, each process loads for itself, after DistributedDataParallel has shared its own."""
        found = of_each((problem, iteration, checksum(self.objects.values()) if ranks()[1] > 1 else 0))
        problems = sorted({other for other, *_ in found if other})
        if problems:
            raise WeightsError("; ".join(problems))
        if len(set(found)) > 1:
            told = "; ".join(f"rank {i}: iteration {at}, checksum {crc:08x}" for i, (_, at, crc) in enumerate(found))
            raise WeightsError(
                f"the processes start from different weights ({told}): expected the same files under checkpoints/ and "
                "pretrained_path wherever a process runs"
            )

    def _read(self, engine: Engine, path: Path) -> None:
        content = load_tensors(path)
        absent = sorted(set(self.everything) - set(content if isinstance(content, dict) else ()))
        if absent:
            raise WeightsError(f"{path}: is no full checkpoint of this kind of run, it lacks {absent}")
        try:
            self._load(engine, content)
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"{path}: does not fit this run: {error}") from error

    def _load(self, engine: Engine, content: Mapping[str, Any]) -> None:
        self.progress.load_state_dict(content["progress"])
        before, iteration = content["progress"]["iteration"], engine.state.iteration
        for name, thing in self.everything.items():
            if isinstance(thing, Optimizer):
                load_optimizer(thing, content[name])
            elif not isinstance(thing, (LRScheduler, Progress)):
                thing.load_state_dict(content[name])
            if isinstance(thing, nn.Module) and before != iteration:
                rescale_averages(thing, before, iteration)
        for name, thing in self.everything.items():
            if isinstance(thing, LRScheduler):  # after its optimizer, whose rates it sets
                load_scheduler(thing, content[name], before, iteration)

    def _begin_branch(self, path: Path, iteration: int) -> None:
        """From here on ``latest`` means this branch: later checkpoints of another one are set aside."""
        own = self.folder / f"checkpoint_{iteration}.pt"
        self.saved = iteration
        if path.absolute() not in (own.absolute(), own.with_suffix(".rescued.pt").absolute()):
            # from elsewhere, or of another length of the epoch
            save_tensors(own, self._content())
        for number, other in numbered(self.folder):
            if number > iteration:
                aside = other.with_name(f"{other.name}.old")
                os.replace(other, aside)
                logger.warning("resume: %s is later than where the run goes on: renamed to %s", other, aside.name)


def _attempt(function: Callable[[], Found]) -> tuple[Found | None, str]:
    """What it gives, or what is wrong with the file: the other processes have to hear of it."""
    try:
        return function(), ""
    except WeightsError as error:
        if ranks()[1] == 1:
            raise
        return None, str(error)


class WeightsSaver:
    """Writes a module's flat state dict, the file that the zoo, MONAI Label and the other bundle read.

    Attached to an evaluator with `metric`, it writes when that metric is the best so far; without, at each completed
    epoch.

    Args:
        path: of the file, such as ``model.pt``.
        module: what to save; wrappers (DDP, compile) are taken off by passing the plain module.
        metric: name of the evaluator's metric.
        greater_is_better: direction of `metric`.
        best: False writes at each validation, so that the last one stays.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        *,
        metric: str | None = None,
        greater_is_better: bool = True,
        best: bool = True,
    ) -> None:
        self.path, self.module, self.metric = Path(path), module, metric if best else None
        self.sign = 1.0 if greater_is_better else -1.0
        self.best, self.crc32 = -math.inf, None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.metric is not None:
            value = self.sign * float(engine.state.metrics[self.metric])
            if not value > self.best:  # a NaN is never the best
                return
            self.best = value
            logger.info("best %s so far: %.4f", self.metric, self.sign * value)
        if is_first():
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
            save_tensors(self.path, state)
            self.crc32 = self._checksum()

    def _checksum(self) -> int | None:
        return zlib.crc32(self.path.read_bytes()) if self.path.is_file() else None

    def state_dict(self) -> dict[str, float | int | None]:
        return {"best": self.best, "crc32": self.crc32}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        self.best, self.crc32 = state["best"], state["crc32"]
        if self.metric is not None and self._checksum() != self.crc32:
            # a later validation's, which comes again, or an abandoned branch's: the best of this one replaces it
            level = logging.INFO if self.path.is_file() else logging.WARNING
            logger.log(level, "%s is not the file of this checkpoint: the next validation writes it", self.path)
            self.best = -math.inf
