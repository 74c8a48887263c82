# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Full checkpoints for resuming and the flat ``model.pt``, both written under a temporary name and renamed (Ignite's
atomic DiskSaver), so that a run killed while it writes keeps the last good file."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, global_step_from_engine
from torch import nn

from .sampler import EpochSampler
from .weights import WeightsError, load_tensors

__all__ = ["Checkpoints", "RandomState", "WeightsSaver", "newest_checkpoint"]

logger = logging.getLogger(__name__)


class RandomState:
    """State of the random generators of Python, numpy and torch, as plain types that ``weights_only=True`` accepts."""

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


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint of the highest iteration.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    found = list(Path(folder).glob("checkpoint_*.pt"))
    if not found:
        raise FileNotFoundError(f"resume: no checkpoint in {folder}")
    return max(found, key=lambda path: int(path.stem.rsplit("_", 1)[1]))


class Checkpoints:
    """Trainer handler: saves everything that a run needs to go on, and restores it.

    Place it after the validation handler, so that the best metric of the epoch is in the checkpoint.

    Args:
        folder: where ``checkpoint_<iteration>.pt`` goes.
        objects: what to save, by name; each has ``state_dict`` and ``load_state_dict``. The trainer itself and the
            random generators are added.
        sampler: told the epoch when it starts.
        resume: None, a file, or ``latest``, which starts from the beginning where there is no checkpoint yet.
        keep: number of checkpoints kept.
        interval: epochs between two.
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
    ) -> None:
        self.folder, self.objects, self.sampler, self.resume = folder, dict(objects), sampler, resume
        self.keep, self.interval = keep, interval

    def attach(self, engine: Engine) -> None:
        everything = {**self.objects, "trainer": engine, "random": RandomState()}
        save = Checkpoint(
            everything,
            DiskSaver(self.folder, create_dir=True, require_empty=False, atomic=True),
            filename_pattern="checkpoint_{global_step}.pt",
            n_saved=self.keep,
            global_step_transform=global_step_from_engine(engine, Events.ITERATION_COMPLETED),
        )
        engine.add_event_handler(Events.STARTED, self._restore, everything)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval) | Events.COMPLETED, save)

    def _start_epoch(self, engine: Engine) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch - 1)

    def _restore(self, engine: Engine, everything: Mapping[str, Any]) -> None:
        if self.resume is None:
            return
        try:
            path = newest_checkpoint(self.folder) if self.resume == "latest" else Path(self.resume)
        except FileNotFoundError:
            logger.warning("resume: no checkpoint in %s yet: the run starts from the beginning", self.folder)
            return
        content = load_tensors(path)
        absent = sorted(set(everything) - set(content if isinstance(content, dict) else ()))
        if absent:
            raise WeightsError(f"{path}: is no full checkpoint of this kind of run, it lacks {absent}")
        max_epochs = engine.state.max_epochs
        Checkpoint.load_objects(to_load=dict(everything), checkpoint=content)
        engine.state.max_epochs = max_epochs
        logger.info("resumed from %s: epoch %d, iteration %d", path, engine.state.epoch, engine.state.iteration)


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
        self.best = -math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.metric is not None:
            value = self.sign * float(engine.state.metrics[self.metric])
            if not value > self.best:  # a NaN is never the best
                return
            self.best = value
            logger.info("best %s so far: %.4f", self.metric, self.sign * value)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
        DiskSaver(self.path.parent, require_empty=False, atomic=True)(state, self.path.name)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]
