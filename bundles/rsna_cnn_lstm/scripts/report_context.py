# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of the report that look beyond the results: earlier runs, the training of the weights, the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workflow.dataset import SlabDataset
from workflow.privacy import pseudonym
from workflow.provenance import run_folder_of

from .earlier_runs import find_earlier_runs
from .figures import learning_figure, runs_figure, slices_figure
from .labels import MISSING
from .learning_curves import by_epoch, read_scalars
from .results import BASELINE, Card, Picture, Results, Section, Table, number, with_interval

__all__ = ["learning", "runs", "worst_patients"]

WORST = 10  # patients in the table
SHOWN = 5  # of them with their slices
NAMED = 5  # runs of other patients that are named


def runs(results: Results) -> Section:
    """This run beside earlier evaluations of the same patients."""
    found = find_earlier_runs(results.folder)
    section = Section("runs", "Earlier runs")
    everything = [(f"{results.folder.name} (this run)", results.metrics), *found.comparable]
    everything = [(f"{name} (calibrated)" if metrics.get("calibration") else name, metrics)
                  for name, metrics in everything]  # fmt: skip
    if found.comparable:
        section.text.append(
            "Evaluations in the same output_root of the same patients with the same truth, oldest first."
        )
        rows = [(name, metrics["score"]) for name, metrics in everything]
        figure = runs_figure(rows, results.metrics["baseline"]["score"])
        section.pictures.append(Picture("runs", "Scores of this and earlier runs with 95 % intervals", figure))
    else:
        section.text.append("There is no earlier evaluation of the same patients in this output_root.")
    terms = list(results.metrics["score_terms"])
    rows = [
        (name, with_interval(metrics["score"]), with_interval(metrics["mAP"]),
         *(number(metrics["score_terms"].get(term, {}).get("value")) for term in terms))
        for name, metrics in everything
    ]  # fmt: skip
    base = results.metrics["baseline"]
    rows.append((BASELINE, number(base["score"]), number(base["mAP"]),
                 *(number(base["score_terms"][term]) for term in terms)))  # fmt: skip
    heads = ("run", "score", "mAP", *(term.replace("_", " ") for term in terms))
    section.tables.append(Table("Runs", heads, rows))
    if found.others:
        named = ", ".join(found.others[:NAMED]) + (", ..." if len(found.others) > NAMED else "")
        section.text.append(f"Left out, for they are of other patients or labels: {len(found.others)} ({named}).")
    section.text += [
        f"Left out, for its results cannot be read: {name} ({reason})." for name, reason in found.unreadable
    ]
    return section


def learning(weights: str | Path | Sequence[str | Path] | None) -> Section:
    """Loss and validation score of the training that made the weights, from TensorBoard's files beside them.

    Args:
        weights: path of the weights or a checkpoint; several (an ensemble) or ``None`` (results from tables) show none.
    """
    section = Section("learning", "Learning curves")
    if isinstance(weights, (list, tuple)) and len(weights) == 1:
        weights = weights[0]
    if not isinstance(weights, (str, Path)):
        section.text.append("These results are not those of one weights file: there is no single training to show.")
        return section
    folder = run_folder_of(Path(weights).absolute())
    scalars = read_scalars(folder / "tensorboard")
    epochs = by_epoch(scalars)
    if epochs.empty:
        section.text.append(f"No TensorBoard events lie beside the weights of {folder.name}.")
        return section
    section.text.append(f"Training run {folder.name}, from its TensorBoard events.")
    if "train_loss" in scalars or "loss" in epochs:
        section.pictures.append(Picture("learning", "Training loss and validation score by epoch",
                                        learning_figure(epochs, scalars.get("train_loss"))))  # fmt: skip
    heads = ("epoch", *(name.replace("_", " ") for name in epochs.columns))
    rows = [(str(epoch), *("" if np.isnan(v) else number(v) for v in row))
            for epoch, row in zip(epochs.index, epochs.to_numpy(), strict=True)]  # fmt: skip
    section.tables.append(Table("Values by epoch", heads, rows, folded=True))
    return section


def worst_patients(results: Results, dataset: SlabDataset | None) -> Section:
    """The patients that cost most of the score, with slices of their series where the dataset is at hand."""
    parts = results.contributions()
    totals = parts.sum(axis=1)
    order = np.argsort(-totals, kind="stable")[:WORST]
    groups = results.table.groups
    rows = []
    for position in order:
        cells = [f"{truth} {probability}" if truth else "" for truth, _, probability in _calls(results, position)]
        share = number(100 * totals[position] / totals.sum(), 1)
        rows.append((results.patients.ids[position], number(totals[position], 4), share, *cells))
    heads = ("patient", "contribution", "% of score", *(group.name.replace("_", " ") for group in groups))
    text = [
        "A patient's contribution is its share of each term's weighted mean, averaged over the terms: over all "
        "patients they add up to the score. Cells: the true class and the probability that it was given."
    ]
    section = Section("worst", "Worst-scored patients", text, tables=[Table("Largest contributions", heads, rows)])
    if dataset is not None:
        section.text.append("Slices as the network's preparation leaves them (cropped to the body, windowed), from top "
                            "to bottom; the patient's right is on the left.")  # fmt: skip
        section.cards = [_card(results, rank, position, parts[position], dataset)
                         for rank, position in enumerate(order[:SHOWN], start=1)]  # fmt: skip
    return section


def _calls(results: Results, position: int) -> list[tuple[str, str, str]]:
    """(truth, most probable class, probability of the truth) by group; empty texts without a label."""
    calls = []
    for index, group in enumerate(results.table.groups):
        true, probability = results.patients.classes[position, index], results.patients.probabilities[index][position]
        called = group.classes[int(probability.argmax())].name
        known = true != MISSING
        calls.append((group.classes[true].name, called, number(probability[true])) if known else ("", called, ""))
    return calls


def _card(results: Results, rank: int, position: int, parts: np.ndarray, dataset: SlabDataset) -> Card:
    patient = results.patients.ids[position]
    calls = zip(results.table.group_names, _calls(results, position), parts, strict=False)  # the last part: any injury
    rows = [(name, *call, number(part, 4)) for name, call, part in calls]
    heads = ("group", "truth", "predicted", "p of the truth", "contribution")
    card = Card(f"Patient {patient}", f"Contribution to the score: {number(parts.sum(), 4)}",
                [Table("Truth and prediction", heads, rows)])  # fmt: skip
    for k, item in enumerate(_series_of(patient, dataset), start=1):
        volume: Any = dataset.cache.load(item)
        figure = slices_figure(volume[0].numpy(), volume.pixdim.tolist())
        card.pictures.append(
            Picture(f"worst_{rank}_series_{k}", f"Series {k} of patient {patient}", figure, raster=True)
        )
    return card


def _series_of(patient: str, dataset: SlabDataset) -> list[dict[str, Any]]:
    """The dataset's items of a patient, named as in the tables: by its folder or by a pseudonym of it."""
    items = [item for item in dataset.data if patient in (str(item["patient_id"]), pseudonym(str(item["patient_id"])))]
    if not items:
        raise ValueError(f"the dataset holds no series of patient {patient}, whose prediction is in predictions.csv")
    return items
