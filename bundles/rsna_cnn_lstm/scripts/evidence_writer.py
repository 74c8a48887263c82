# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Handler of an evaluator that writes the evidence of each series: a picture and its numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from tqdm import tqdm
from workflow.run import write_atomically

from .evidence import find_evidence
from .evidence_figure import RANKS, EvidencePicture, GroupStrip, draw_evidence
from .network import CNNLSTM
from .predictions import PredictionWriter

__all__ = ["EvidenceWriter"]

logger = logging.getLogger(__name__)


class EvidenceWriter:
    """Writes ``evidence/000001.png`` and ``evidence/000001.json`` for ``series/000001.json``, and so on.

    To be attached after the writer of the predictions, whose running numbers and probabilities these are: pictures are
    drawn when its run completes. Until then the evidence lies in a temporary folder of the run. Series that failed have
    no evidence. No id of a patient or series gets into the files.

    Args:
        network: the CNN-LSTM. Of an ensemble the evidence is that of one member, while the probabilities are those of
            all.
        writer: the writer of the predictions.
        num_slices: top slices shown for each group, 1 to 10.
    """

    def __init__(self, network: CNNLSTM, writer: PredictionWriter, num_slices: int = 3) -> None:
        if not isinstance(num_slices, int) or not 1 <= num_slices <= len(RANKS):
            raise ValueError(f"evidence_slices: expected 1 to {len(RANKS)}, got {num_slices!r}")
        self.network, self.writer, self.num_slices = network, writer, num_slices

    def attach(self, engine: Engine) -> None:
        """Registers the handler."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _started(self, _engine: Engine) -> None:
        self.writer.output_dir.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(dir=self.writer.output_dir, prefix="evidence-")
        self._pending: dict[tuple[str, str], Path] = {}

    def __call__(self, engine: Engine) -> None:
        """Keeps the evidence of the iteration that has completed (the engine decollates, MONAI's default)."""
        for item in engine.state.batch:
            if item.get("failed"):
                continue
            if "slice_affine" not in item:
                raise ValueError("an item lacks slice_affine; the preprocessing must end with SliceAffinesd")
            path = Path(self._folder.name) / f"{len(self._pending)}.npz"
            np.savez_compressed(path, **self._collect(item))
            self._pending[str(item["patient_id"]), str(item["series_id"])] = path

    def _collect(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays of one item; images and heat maps of the top slices in 8 bits."""
        image = torch.as_tensor(item["image"]).cpu()
        evidence = find_evidence(self.network, image, self.writer.table, self.num_slices)
        shown = image[len(image) // 2].movedim(-1, 0)  # the slice itself among its neighbours (2.5D): (S, X, Y)
        affine = torch.as_tensor(item["slice_affine"], dtype=torch.float64).cpu()
        centre = torch.tensor([(shown.shape[1] - 1) / 2, (shown.shape[2] - 1) / 2, 0, 1], dtype=torch.float64)
        arrays = {
            "log_odds": evidence.log_odds, "change": evidence.change, "top": evidence.top,
            "heat": _to_bytes(evidence.heat), "images": _to_bytes(shown)[evidence.top],
            "z": (affine @ centre)[:, 2], "pixel_size": affine[0, :3, :2].norm(dim=0),
        }  # fmt: skip
        arrays |= {} if evidence.attention is None else {"attention": evidence.attention}
        return {name: value.numpy() for name, value in arrays.items()}

    def _finish(self, _engine: Engine) -> None:
        with self._folder:
            rows = [] if self.writer.series is None else self.writer.series.to_dict("records")
            for number, row in enumerate(tqdm(rows, desc="evidence", leave=False, mininterval=1.0), start=1):
                path = self._pending.get((row["patient_id"], row["series_id"]))
                if path is not None:  # None: of another process of a distributed run, which writes it
                    with np.load(path) as arrays:
                        self._write(f"{number:06d}", dict(arrays), row)
        logger.info("Wrote evidence of %d series to %s", len(self._pending), self.writer.output_dir / "evidence")

    def _write(self, name: str, arrays: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> None:
        table, top = self.writer.table, arrays["top"]
        attention = arrays.get("attention")
        groups, numbers = [], {}
        for g, group in enumerate(table.groups):
            probabilities = {item.name: row[f"{group.name}_{item.name}"] for item in group.classes}
            strip = (arrays[key][g] for key in ("change", "top", "images", "heat"))
            groups.append(GroupStrip(group.name, probabilities, *strip))
            numbers[group.name] = {
                "injury_log_odds": float(arrays["log_odds"][g]),
                "change": arrays["change"][g].tolist(),
                "top_slices": top[g].tolist(),
            }
        pixel_size = (float(arrays["pixel_size"][0]), float(arrays["pixel_size"][1]))
        picture = EvidencePicture(f"Series {name}: what moved the decision", arrays["z"], pixel_size, attention, groups)
        content = {
            "series": f"series/{name}.json",
            "slice_z_mm": arrays["z"].tolist(),
            "attention": None if attention is None else attention.tolist(),
            "groups": numbers,
        }
        folder = self.writer.output_dir / "evidence"
        write_atomically(folder / f"{name}.png", draw_evidence(picture))
        write_atomically(folder / f"{name}.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def _to_bytes(values: Tensor) -> Tensor:
    """0..1 -> 0..255."""
    return (values * 255).round().clamp(0, 255).to(torch.uint8)
