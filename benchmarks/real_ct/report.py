# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, plot and headline of ``benchmarks.real_ct``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.common import table
from benchmarks.provenance import revision_note
from benchmarks.windows import baselines_text

from .data import MASKED

TITLE = "Real CT: what pretraining gives on a patient left out"
COMMAND = (
    "# DIR: the whole series of the four patients that tests/data/README.md cites (The Cancer Imaging Archive), under"
    "\n# the names of FULL in benchmarks/real_ct/data.py\n"
    "python -m benchmarks.real_ct --data DIR --work out/real_ct --workers 2 --out benchmarks/results/real_ct.json"
)
NETWORKS = ("untrained", "phantoms", "phantoms and patients")
OURS = NETWORKS[-1]
# figure -> its title, and whether more is better
FIGURES = {
    "position_accuracy": ("position accuracy", True),
    "height_mm": ("slice height error within the patient, mm", False),
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


def verdict(low: float, high: float, more: bool) -> str:
    """What an interval over seeds says of a difference; of these patients alone, whatever it is."""
    if low <= 0 <= high:
        return "0 is inside"
    better = (low > 0) == more
    return f"{'above' if low > 0 else 'below'} 0 over seeds, on these patients: {'better' if better else 'worse'}"


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """Ours beside the others, paired by seed, as lines of a table."""
    lines = []
    for name, (title, more) in FIGURES.items():
        for other in NETWORKS[:-1]:
            ours, theirs = (values(results, network, name) for network in (OURS, other))
            mean, low, high = interval((ours - theirs).mean(axis=0))
            each = (ours - theirs).mean(axis=1)  # of each patient or organ, over the seeds
            agree = f"{int((np.sign(each) == np.sign(mean)).sum())} of {len(each)}"
            of = "organs of one patient" if name == "organ_auc" else "patients"
            digits = 1 if name == "height_mm" else 3
            text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            lines.append([title, other, text, verdict(low, high, more), f"{agree} {of}"])
    return lines


def of_baselines(results: dict[str, Any]) -> np.ndarray:
    """[patients, 2] slice height error in mm of the constant, and of brightness and body area."""
    first = [measured(results, OURS, patient)[0] for patient in patients(results)]
    return np.array([[one["height_mm_constant"], one["height_mm_brightness"]] for one in first])


def position_baseline(results: dict[str, Any]) -> dict[str, float]:
    """Of the patients' windows, which are the same for all networks."""
    each = [measured(results, OURS, patient)[0]["position_baselines"] for patient in patients(results)]
    return {name: float(np.mean([one[name] for one in each])) for name in ("chance", "centre")}


def section(results: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    sizes, settings, names = results["sizes"], results["settings"], patients(results)
    found = organs(results)
    label = measured(results, OURS, MASKED)[0]
    per_organ = [f"{organ} ({label['organ_slices'][organ]} of {label['slices']} slices)" for organ in found]
    plain = of_baselines(results)
    heights = [
        [*row, *(f"{value:.1f}" for value in both)]
        for row, both in zip(_rows(results, "height_mm", names, 1), [*plain, plain.mean(axis=0)], strict=True)
    ]
    phantoms = [cell(of_organs(results, network, "organ_auc_phantoms").mean(axis=0), 3) for network in NETWORKS]
    head = ["patient", *NETWORKS]
    return f"""{len(names)} patients (real CT, CC BY; tests/data/README.md cites them), {results["seeds"]} seeds,
{settings["backbone_name"]}, volumes of {" x ".join(map(str, settings["volume_size"]))}, {sizes["steps"]} steps of
{settings["batch_size"]} volumes. "phantoms": pretrained on {sizes["phantoms"]} **synthetic** volumes. "phantoms and
patients": as many steps, half of each on the other real patients, half on the same phantoms; the patient of the line
was left out. Each cell: mean over seeds (smallest to largest). BN statistics are set from the measured
volumes, without labels, for all networks. So few patients say how the software behaves on real CT, not how it does on
patients at large. {revision_note(Counter(one["revision"] for one in results["trainings"]))}

Position accuracy, {settings["num_val_crops"]} windows of each patient; without looking,
{baselines_text(position_baseline(results))}:

{table(head, _rows(results, "position_accuracy", names, 3))}

Slice height within the patient: mean absolute error in mm of a ridge on frozen slice features that learns from
alternating blocks of four prepared slices of the patient and predicts the patient's others (penalty chosen by leaving
out whole blocks). Last columns: the constant, and the same ridge on two numbers of a slice, mean brightness and body
area; both learn from the same slices:

{table([*head, "constant", "brightness and area"], heights)}

Organ presence on {MASKED} (model-made labels): AUC over its prepared slices of a logistic regression on frozen slice
features that learnt from {sizes["probe_phantoms"]} further phantoms (**synthetic**), chance 0.5:

{table(["organ", *NETWORKS], [*_rows(results, "organ_auc", per_organ, 3), ["phantoms, on other phantoms", *phantoms]])}

Phantoms and patients minus the others, mean over patients (organs), paired by seed, 95 % t interval over
{results["seeds"]} seeds. Such an interval holds the patients fixed and says nothing of others; those of organ presence
are {len(found)} organs of one patient. Last column: in how many the mean over the seeds has the sign of the difference:

{table(["figure", "beside", "difference", "interval over seeds", "same sign in"], _differences(results))}

![Figures on the patient left out](benchmarks/real_ct.png)
"""


def headline(results: dict[str, Any]) -> str | None:
    """One sentence for the README."""
    found = {network: of_patients(results, network, "position_accuracy") for network in NETWORKS}
    accuracy = {network: cell(each.mean(axis=0), 2) for network, each in found.items()}
    return (
        f"Real CT, each of {len(patients(results))} patients left out in turn: position accuracy {accuracy[OURS]}"
        f" after pretraining on phantoms and the others, {accuracy['phantoms']} on phantoms alone,"
        f" {accuracy['untrained']} untrained; always the centre {position_baseline(results)['centre']:.2f} (mean over"
        f" patients, smallest to largest of {results['seeds']} seeds; {results['machine']['cpu']})"
    )


def plots(results: dict[str, Any], folder: Path) -> None:
    """``real_ct.png``: each figure's seeds for each network, one line a patient or organ."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
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
    figure.savefig(folder / "real_ct.png", dpi=72)
