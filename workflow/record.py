# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The handler that brings a run's figures, and what its data were, into ``run.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events

from .cache import fingerprint
from .dataset import SlabDataset
from .manifest import plain_numbers
from .run import RunFolder

__all__ = ["RunRecord", "data_fingerprint"]


def data_fingerprint(dataset: SlabDataset) -> dict[str, Any]:
    """Number of series, and one hash over their sorted ids and contents: equal for two runs on the same data prepared
    alike, wherever they lie, and no id or path can be read from it.

    The contents are the checksums of the prepared volumes (``slabs:``) or, without a cache, the sizes of the files
    (``files:``).
    """
    cached = dataset.cache.folder is not None
    lines = []
    for item in dataset.data:
        sources = dataset.cache.sources(item)
        slab = dataset.slabs.get(sources) or dataset.cache.path_of(item)
        if slab is None:
            content = [sorted(entry[1] for entry in fingerprint(source)[1]) for source in sources]
        else:
            meta = json.loads(slab.with_suffix(".json").read_text(encoding="utf-8"))
            content = [meta["shape"], meta["crc32"]]
        lines.append(json.dumps([str(item["series_id"]), content]))
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"series": len(lines), "fingerprint": f"{'slabs' if cached else 'files'}:{digest}"}


class RunRecord:
    """Handler of trainer and validator: leaves their last figures with the run folder, and the fingerprints of the data
    when the engine starts.

    Args:
        run_folder: keeps ``metrics`` and ``data``, which it writes into ``run.json``.
        datasets: name (training, validation) -> prepared dataset; None for none.
    """

    def __init__(self, run_folder: RunFolder, datasets: Mapping[str, SlabDataset] | None = None) -> None:
        self.run_folder, self.datasets = run_folder, dict(datasets or {})

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._describe_data)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._keep_metrics)

    def _describe_data(self, engine: Engine) -> None:
        self.run_folder.data.update({name: data_fingerprint(dataset) for name, dataset in self.datasets.items()})

    def _keep_metrics(self, engine: Engine) -> None:
        self.run_folder.metrics.update(plain_numbers(engine.state.metrics))
