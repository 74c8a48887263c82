# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, plot and headline of ``benchmarks.real_ct``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.common import table

from .data import MASKED

TITLE = "Real CT: what pretraining gives on a patient left out"
COMMAND = (
    "python -m benchmarks.real_ct --data ../shared/data/abdomen --work out/real_ct --workers 2"
    " --out benchmarks/results/real_ct.json"
)
NETWORKS = ("untrained", "phantoms", "phantoms and patients")
OURS = NETWORKS[-1]
CHANCE = 1 / 9
# figure -> its title, and whether more is better
FIGURES = {
    "position_accuracy": ("position accuracy", True),
    "height_mm": ("slice height error, mm", False),
    "organ_auc": ("organ presence, AUC", True),
}


def patients(results: dict[str, Any]) -> list[str]:
    """Those left out, in the order of the run."""
    return list(dict.fromkeys(one["left_out"] for one in results["trainings"] if one["left_out"] is not None))


def measured(results: dict[str, Any], network: str, patient: str) -> list[dict[str, Any]]:
    """What each seed of a network found on a patient that it had not seen, in the order of the seeds."""
    found = [
        (one["seed"], one["patients"][patient])
        for one in results["trainings"]
        if one["network"] == network and patient in one["patients"]
    ]
    return [figures for _, figures in sorted(found, key=lambda pair: pair[0])]


def of_patients(results: dict[str, Any], network: str, name: str) -> np.ndarray:
    """[patients, seeds] of one figure."""
    return np.array([[one[name] for one in measured(results, network, patient)] for patient in patients(results)])


def of_organs(results: dict[str, Any], network: str, name: str = "organ_auc") -> np.ndarray:
    """[organs, seeds] on the patient with organ labels, for the organs that every seed could be asked."""
    found = measured(results, network, MASKED)
    return np.array([[one[name].get(organ, np.nan) for one in found] for organ in organs(results)])


def organs(results: dict[str, Any]) -> list[str]:
    """Organs that a part of the labelled patient's slices shows."""
    return list(measured(results, OURS, MASKED)[0]["organ_auc"])


def values(results: dict[str, Any], network: str, name: str) -> np.ndarray:
    """[patients or organs, seeds] of a figure of `FIGURES`."""
    return of_organs(results, network) if name == "organ_auc" else of_patients(results, network, name)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % t interval over seeds.

    Raises:
        ValueError: for fewer than two seeds.
    """
    if len(differences) < 2:
        raise ValueError(f"expected at least two seeds, found {len(differences)}")
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean, mean - half, mean + half


def cell(seeds: np.ndarray, digits: int) -> str:
    """Mean over the seeds with the smallest and largest."""
    return f"{seeds.mean():.{digits}f} ({seeds.min():.{digits}f} to {seeds.max():.{digits}f})"


def _rows(results: dict[str, Any], name: str, labels: Sequence[str], digits: int) -> list[list[str]]:
    found = [values(results, network, name) for network in NETWORKS]
    rows = [[label, *(cell(one[k], digits) for one in found)] for k, label in enumerate(labels)]
    return [*rows, ["**mean**", *(cell(one.mean(axis=0), digits) for one in found)]]


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """Ours beside the others, paired by seed, as lines of a table."""
    lines = []
    for name, (title, more) in FIGURES.items():
        for other in NETWORKS[:-1]:
            ours, theirs = (values(results, network, name).mean(axis=0) for network in (OURS, other))
            mean, low, high = interval(ours - theirs)
            better = (low > 0) if more else (high < 0)
            worse = (high < 0) if more else (low > 0)
            verdict = "better" if better else "worse" if worse else "no difference shown"
            digits = 1 if name == "height_mm" else 3
            lines.append([title, other, f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", verdict])
    return lines


def section(results: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    sizes, settings, names = results["sizes"], results["settings"], patients(results)
    found = organs(results)
    label = measured(results, OURS, MASKED)[0]
    per_organ = [f"{organ} ({label['organ_slices'][organ]} of {label['slices']} slices)" for organ in found]
    constant = np.array([measured(results, OURS, patient)[0]["height_mm_constant"] for patient in names])
    heights = [
        [*row, f"{value:.1f}"]
        for row, value in zip(_rows(results, "height_mm", names, 1), [*constant, constant.mean()], strict=True)
    ]
    phantoms = [cell(of_organs(results, network, "organ_auc_phantoms").mean(axis=0), 3) for network in NETWORKS]
    head = ["patient", *NETWORKS]
    return f"""{len(names)} patients (real CT, CC BY; tests/data/README.md cites them), {results["seeds"]} seeds,
{settings["backbone_name"]}, volumes of {" x ".join(map(str, settings["volume_size"]))}, {sizes["steps"]} steps of
{settings["batch_size"]} volumes. "phantoms": pretrained on {sizes["phantoms"]} **synthetic** volumes. "phantoms and
patients": as many steps, half of each on the other real patients, half on the same phantoms; the patient of the line
was left out. Each cell: mean over seeds (smallest to largest). BN statistics are set from the measured
volumes, without labels, for all networks. So few patients say how the software behaves on real CT, not how it does on
patients at large.

Position accuracy, {settings["num_val_crops"]} windows of each patient; chance is about {CHANCE:.2f}:

{table(head, _rows(results, "position_accuracy", names, 3))}

Slice height: mean absolute error in mm of a ridge on frozen slice features that learns from alternating blocks of four
prepared slices of the patient and predicts the others; last column: the constant, learnt from the same slices:

{table([*head, "constant"], heights)}

Organ presence on {MASKED} (model-made labels): AUC over its prepared slices of a logistic regression on frozen slice
features that learnt from {sizes["probe_phantoms"]} further phantoms (**synthetic**), chance 0.5:

{table(["organ", *NETWORKS], [*_rows(results, "organ_auc", per_organ, 3), ["phantoms, on other phantoms", *phantoms]])}

Phantoms and patients minus the others, mean over patients (organs), paired by seed, 95 % t interval over
{results["seeds"]} seeds:

{table(["figure", "beside", "difference", "verdict"], _differences(results))}

![Figures on the patient left out](benchmarks/real_ct.png)
"""


def headline(results: dict[str, Any]) -> str | None:
    """One sentence for the README."""
    accuracy = {network: of_patients(results, network, "position_accuracy").mean() for network in NETWORKS}
    return (
        f"Real CT, each of {len(patients(results))} patients left out in turn: position accuracy {accuracy[OURS]:.2f}"
        f" after pretraining on phantoms and the others, {accuracy['phantoms']:.2f} on phantoms alone,"
        f" {accuracy['untrained']:.2f} untrained ({results['machine']['cpu']})"
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """``real_ct.png``: each figure's seeds for each network, one line a patient or organ."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, (title, _)) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        found = [values(results, network, name) for network in NETWORKS]
        labels = organs(results) if name == "organ_auc" else patients(results)
        for k, label in enumerate(labels):
            axis.plot(range(len(NETWORKS)), [one[k].mean() for one in found], marker="o", label=label)
            for x, one in enumerate(found):
                axis.plot([x] * one.shape[1], one[k], ".", color="0.6", markersize=4, zorder=0)
        axis.set_xticks(range(len(NETWORKS)), [network.replace(" and ", "\nand ") for network in NETWORKS], fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=6)
    figure.savefig(folder / "real_ct.png", dpi=80)
