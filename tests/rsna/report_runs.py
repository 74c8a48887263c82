# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Run folders of evaluations as `PredictionWriter` leaves them, from drawn numbers; and a reader of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Lambda
from workflow.dataset import SlabDataset

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.metrics import evaluate_patients

ROOT = Path(__file__).parents[2]
LABELS_FILE = ROOT / "bundles/rsna_cnn_lstm/configs/labels.json"
TABLE = LabelTable.from_file(LABELS_FILE)


def draw(table: LabelTable, patients: int, seed: int, skill: float = 2.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Truth and predictions; the truth depends on the seed alone, the predictions also on the skill."""
    rng = np.random.default_rng(seed)
    truth, predicted = [], []
    for group in table.groups:
        size = len(group.classes)
        true = rng.choice(size, patients, p=[0.6] + [0.4 / (size - 1)] * (size - 1))
        noise = rng.normal(size=(patients, size))
        truth.append(np.eye(size)[true])
        predicted.append(torch.softmax(torch.tensor(skill * np.eye(size)[true] + noise), dim=1).numpy())
    ids = [f"p{number:03d}" for number in range(patients)]
    frames = [pd.DataFrame(np.concatenate(parts, axis=1), columns=list(table.columns)) for parts in (truth, predicted)]
    for frame in frames:
        frame.insert(0, "patient_id", ids)
    return frames[0], frames[1]


def write_run(
    folder: Path,
    table: LabelTable = TABLE,
    patients: int = 40,
    seed: int = 0,
    skill: float = 2.0,
    n_resamples: int = 50,
    frames: tuple[pd.DataFrame, pd.DataFrame] | None = None,
) -> Path:
    """A folder with the files of an evaluation."""
    solution, predictions = frames or draw(table, patients, seed, skill)
    folder.mkdir(parents=True)
    solution.to_csv(folder / "solution.csv", index=False)
    predictions.to_csv(folder / "predictions.csv", index=False)
    predictions.assign(series_id="1.2.840.113619.2.5.1762583153").to_csv(folder / "series_predictions.csv", index=False)
    metrics = evaluate_patients(solution, predictions, table, n_resamples, seed=0)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    manifest = {"started": "2026-01-02T03:04:05", "versions": {"monai": "1.6.1"}}
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def volumes(patients: list[str]) -> SlabDataset:
    """Prepared volumes without files: two series of each patient, bright at the patient's right front top."""
    volume = torch.zeros(1, 12, 10, 8, dtype=torch.uint8)
    volume[:, 9:, 8:, 6:] = 255
    items = [{"image": f"{p}/{k}", "patient_id": p, "series_id": str(k)} for p in patients for k in range(2)]
    affine = torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0]))
    return SlabDataset(items, Compose([Lambda(lambda item: {**item, "image": MetaTensor(volume, affine=affine)})]))


class Page(HTMLParser):
    """Tables by caption, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._tags.append(tag)
        if tag == "tr":
            self._row: list[str] = []
        if tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._tags:
            while self._tags.pop() != tag:
                pass
        if tag == "tr":
            self.tables[self._caption].append(self._row)

    def handle_data(self, data: str) -> None:
        if "style" in self._tags:
            return
        self.text += data
        if self._tags and self._tags[-1] == "caption":
            self._caption = data
            self.tables.setdefault(data, [])
        elif {"td", "th"} & set(self._tags):
            self._row[-1] += data
