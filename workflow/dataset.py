# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets whose randomness is a pure function of (seed, epoch, item): the same for any number of workers, and after a
resume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Randomizable
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from .cache import SlabCache, slab_bytes
from .errors import root_cause
from .gather import in_rank_order, ranks
from .run import DISK_FULL

__all__ = ["PreparationError", "SeriesDataset", "SlabDataset", "collate_plain"]

logger = logging.getLogger(__name__)


class PreparationError(ValueError):
    """Series that could not be prepared, each with its reason."""


class SlabDataset(Dataset):
    """Prepared volumes of a datalist with random transforms on top.

    Args:
        data: datalist, see `workflow.datalist`.
        prepare: the deterministic part, cached; gives a MetaTensor under `key`.
        transform: what follows at each access, random or not.
        cache_dir: folder of the slabs; None for no cache.
        seed: with the sampler's number it decides what the random transforms draw.
        skip_failed: go on without the series that cannot be prepared, instead of stopping.
        num_workers: processes for `prepare_all`.
        key: the volume's key.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        prepare: Compose,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        *,
        cache_dir: str | None = None,
        seed: int = 0,
        skip_failed: bool = False,
        num_workers: int = 0,
        key: str = "image",
    ) -> None:
        self.data = list(data)
        self.cache = SlabCache(prepare, cache_dir, key)
        self.transform, self.seed, self.skip_failed, self.key = transform, seed, skip_failed, key
        self.num_workers = num_workers
        self.failed: list[tuple[str, str]] = []
        self.lost_patients = 0  # none of whose series could be prepared
        # Slab of each series, so that its files are looked at once a run and not at each step. `prepare_all` fills it
        # before the workers of a training start, which get a copy.
        self.slabs: dict[tuple[str, ...], Path | None] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Any:
        item = dict(self.data[number % len(self.data)])
        sources = self.cache.sources(item)
        if sources not in self.slabs:
            self.slabs[sources] = self.cache.path_of(item)
        item[self.key] = self.cache.load(item, self.slabs[sources])
        if self.transform is None:
            return item
        # each random step by itself: Compose would draw their seeds from a generator that it makes anew for each item
        steps = self.transform.transforms if type(self.transform) is Compose else [self.transform]
        random = [step for step in steps if isinstance(step, Randomizable)]
        seeds = np.random.SeedSequence([self.seed, number]).generate_state(len(random))
        for step, seed in zip(random, seeds.tolist(), strict=True):
            step.set_random_state(seed=seed)
        return self.transform(item)

    def prepare_all(self) -> None:
        """Prepare every series ahead, in parallel with a progress bar, and deal with those that fail.

        Raises:
            PreparationError: listing every series that failed and why, unless `skip_failed`. OSError: the disk is full.
        """
        self.prepare_each()
        if not self.failed:
            return
        listing = "\n".join(f"  {path}: {error}" for path, error in self.failed)
        message = f"{len(self.failed)} of {len(self.data)} series cannot be used:\n{listing}"
        if not self.skip_failed or len(self.failed) == len(self.data):
            raise PreparationError(f"{message}\n(--skip_failed True goes on without them)")
        logger.warning(message)
        bad = {path for path, _ in self.failed}
        patients = {item.get("patient_id") for item in self.data}
        self.data = [item for item in self.data if item[self.key] not in bad]
        self.lost_patients = len(patients - {item.get("patient_id") for item in self.data})

    def prepare_each(self) -> int:
        """Prepare every series; those that cannot be are listed in `failed` and stay in the dataset.

        The processes of a distributed run share the work and all know the result.

        Returns:
            how many were in the cache already.
        """
        if self.cache.folder is None:
            logger.warning("cache_dir is null: every series is read and prepared again at each step")
        rank, size = ranks()
        results = DataLoader(
            _Preparation(self.cache, self.data),
            batch_size=None,
            sampler=range(rank, len(self.data), size),
            num_workers=self.num_workers,
        )
        bar = tqdm(results, desc="preparing series", unit="series", leave=False, mininterval=1.0)
        self.failed, present = [], 0
        for item, (error, slab, was_there) in zip(self.data, in_rank_order(list(bar)), strict=True):
            present += was_there
            if error:
                self.failed.append((item[self.key], error))
            else:
                self.slabs[self.cache.sources(item)] = slab
        return present


class SeriesDataset(Dataset):
    """Series for inference, read whole at each access. One that fails does not end the run: its item holds zeros and,
    under ``failed``, the reason (an empty string for all others); writers leave it out and list it.

    Args:
        data: datalist.
        transform: from path to network input.
        placeholder: shape of the zeros, channels first.
        key: the volume's key.
    """

    def __init__(
        self, data: Sequence[dict[str, Any]], transform: Callable, placeholder: Sequence[int], *, key: str = "image"
    ) -> None:
        self.data, self.transform, self.placeholder, self.key = list(data), transform, tuple(placeholder), key

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {**self.data[index], "source": self.data[index][self.key], "failed": ""}
        try:
            return self.transform(item)
        except (RuntimeError, ValueError, OSError) as error:
            return {**item, self.key: torch.zeros(self.placeholder), "failed": root_cause(error)}


class _Preparation(Dataset):
    """Prepares item i when asked for it; gives the reason if that failed (else an empty string), the slab's path and
    whether it was there before."""

    def __init__(self, cache: SlabCache, data: Sequence[dict[str, Any]]) -> None:
        self.cache, self.data = cache, data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[str, Path | None, bool]:
        try:
            slab = self.cache.path_of(self.data[index])
            was_there = slab_bytes(slab) > 0
            self.cache.load(self.data[index], slab, verify=True)
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise  # no fault of this series, and the next ones would fail too
            return root_cause(error), None, False
        return "", slab, was_there


def collate_plain(items: Sequence[Any]) -> Any:
    """torch's collation of plain tensors: strided views are copied once, into the batch, and meta data is left
    behind."""
    plain = [
        {key: value.as_tensor() if isinstance(value, MetaTensor) else value for key, value in item.items()}
        for item in items
    ]
    return default_collate(plain)
