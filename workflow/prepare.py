# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Preparation run ahead: every series into the cache, with a report of how long it took and how much it is.

Several such runs may share a cache, and one that is killed leaves whole slabs or none (see `workflow.cache`): started
again, it makes what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from .cache import slab_bytes
from .dataset import SlabDataset
from .run import write_atomically

__all__ = ["Preparation"]

logger = logging.getLogger(__name__)


class Preparation:
    """Prepares every series of a dataset and writes ``prepare.json``.

    Args:
        dataset: whose series and cache.

    Raises:
        ValueError: without a cache there is nothing to prepare for.
    """

    def __init__(self, dataset: SlabDataset) -> None:
        if dataset.cache.folder is None:
            raise ValueError("cache_dir: preparing ahead needs a folder for the prepared volumes, got null")
        self.dataset = dataset

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(path, reason) of each series that could not be prepared."""
        return self.dataset.failed

    def run(self, output_dir: str | Path) -> None:
        """Prepare all series, past those that fail, and report."""
        total, start = len(self.dataset), time.monotonic()
        logger.info("%d series, cache in %s", total, self.dataset.cache.folder)
        present = self.dataset.prepare_each()
        seconds = time.monotonic() - start
        made = total - len(self.failed) - present
        size = sum(slab_bytes(path) for path in self.dataset.slabs.values())
        report = {
            "series": total,
            "prepared": total - len(self.failed),
            "prepared_before": present,
            "failed": len(self.failed),
            "gigabytes": round(size / 1e9, 6),
            "hours": round(seconds / 3600, 6),
            "seconds_a_series": round(seconds / made, 4) if made else None,
            "num_workers": self.dataset.num_workers,
            "cache_dir": str(self.dataset.cache.folder),
        }
        write_atomically(Path(output_dir) / "prepare.json", json.dumps(report, indent=4) + "\n")
        logger.info(
            "%d of %d series prepared (%d now, %d failed): %.2f GB, %.2f h",
            total - len(self.failed), total, made, len(self.failed), size / 1e9, seconds / 3600,
        )  # fmt: skip
