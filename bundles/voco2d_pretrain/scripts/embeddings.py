# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Inference of the pretrained backbone: an embedding of each slice and of the volume, to ``.npz`` files and a CSV
index."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from monai.utils import CommonKeys
from torch import Tensor, nn

__all__ = ["EmbeddingWriter", "SliceInferer2D"]


class SliceInferer2D(Inferer):
    """Runs a 2D network over the slices of a volume, ``[B, C, X, Y, S] -> [B, S, F]``.

    Args:
        slice_batch: slices in one forward pass.
    """

    def __init__(self, slice_batch: int = 64) -> None:
        super().__init__()
        self.slice_batch = slice_batch

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        slices = inputs.permute(0, 4, 1, 2, 3)
        slices = slices.as_tensor() if hasattr(slices, "as_tensor") else slices
        parts = [network(part) for part in slices.flatten(0, 1).split(self.slice_batch)]
        return torch.cat(parts).unflatten(0, slices.shape[:2])


class EmbeddingWriter:
    """Evaluator handler: ``embeddings/00001.npz`` with ``slices`` [S, F] and ``volume`` [F] (their mean) for each
    series, and ``embeddings.csv`` that says which file is which series. File names are numbers, never made of DICOM
    tags.

    Args:
        output_dir: folder for both.
    """

    def __init__(self, output_dir: str) -> None:
        self.folder = Path(output_dir)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[tuple[str, str]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write_index)

    def _reset(self, engine: Engine) -> None:
        self.rows, self.failed = [], []

    def __call__(self, engine: Engine) -> None:
        (self.folder / "embeddings").mkdir(parents=True, exist_ok=True)
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):  # decollated: lists of dicts
            if item["failed"]:
                self.failed.append((item["source"], item["failed"]))
                continue
            features = output[CommonKeys.PRED].float().cpu().numpy()
            name = f"embeddings/{len(self.rows) + 1:05d}.npz"
            np.savez_compressed(self.folder / name, slices=features, volume=features.mean(axis=0))
            self.rows.append({"file": name, "image": item["source"], "slices": len(features)})

    def _write_index(self, engine: Engine) -> None:
        temporary = self.folder / "embeddings.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file", "image", "slices"])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.folder / "embeddings.csv")
