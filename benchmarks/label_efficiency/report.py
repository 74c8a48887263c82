# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the label-efficiency study found, as Markdown."""

from __future__ import annotations

import numpy as np

from benchmarks.common import table
from benchmarks.provenance import revision_note
from benchmarks.windows import baselines_text

from .decisions import Results, select
from .figures import over_seeds
from .plots import draw
from .verdicts import headline, variants, verdict
from .wording import COMPARED, MODES, comparison_cells, name_of, with_interval

__all__ = ["COMMAND", "TITLE", "headline", "plots", "section"]

TITLE = "What pretraining buys: label efficiency on synthetic patients"
COMMAND = (
    "python -m benchmarks.label_efficiency --work out/label_efficiency && python -m benchmarks.label_efficiency"
    " --work out/label_efficiency --read-test --out benchmarks/results/label_efficiency.json"
)
AUC_RATES = (25, 100)
HEALTH = {
    "position_accuracy": "position accuracy",
    "embedding_spread": "embedding spread",
    "organ_auc": "organ-presence AUC",
    "slice_height_error": "slice-height error",
}
GLOSSARY = """Words: *conspicuity* scales the contrast and the size of injuries; at 1, the demo's, they are easy on
purpose. *Scratch* is the same training from random weights; where the backbone is frozen it is a random
one that stays random. *Last blocks*: the last three blocks and the classifier's head are trained. *VoCo
v1* is the loss of VoCo (CVPR 2024), *VoCo v2* that of 2D-VoCo, the bundle's default. The *score* is
RSNA 2023's weighted log loss. *One-sided regulariser* and *hard clamp* are published forms of the loss,
in place of the bundle's symmetric and soft ones."""
plots = draw


def section(results: Results) -> str:
    """All tables of the study."""
    parts = [_introduction(results)]
    for level, conspicuity in results["plan"]["levels"].items():
        parts += [
            f"### Level {level} (conspicuity {conspicuity:g})",
            f"![mAP against labels](benchmarks/label_efficiency_{level}.png)",
            _figure_table(results, level, "mAP"),
            _figure_table(results, level, "score"),
            _auc_table(results, level),
            _difference_table(results, level),
        ]
    parts += [verdict(results), variants(results), _health(results), _validation(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    plan = results["plan"]
    data, fine = plan["data"], plan["fine_tuning"]
    splits = {name: split["patients"] for name, split in data["splits"].items()}
    side, depth = data["size"], data["depth"]
    pretraining, seeds, hours = plan["pretraining"], len(plan["seeds"]), results["core_seconds"] / 3600
    steps = fine["steps"].values()
    levels = next((line for line in plan["about"] if line.startswith("Levels")), "")
    return (
        f"**Synthetic patients** of the demo's generator, {depth} slices of {side} x {side} pixels, prevalence"
        f" {data['prevalence']:g} in each group; timm's `{plan['backbone']}`, far smaller than the bundles' backbone."
        f" {splits['pool']} volumes for pretraining, the labelled {data['labelled']} among them, {splits['validation']}"
        f" for validation, {splits['test']} for the test, which was read once. {pretraining['steps']} steps of"
        f" {pretraining['batch_size']} volumes of pretraining; fine-tuning of {min(steps)} to {max(steps)} steps of"
        f" {fine['batch_size']}, more with more labels. {seeds} seeds, of pretraining, subset and fine-tuning together;"
        f" at 100 % all seeds share the same patients. {hours:.1f} core-hours in all. {levels}\n\nRuns, comparisons and"
        " rules were fixed in `benchmarks/label_efficiency/plan.json` before the first run; the tables of this report"
        " were written after the first runs had begun, and before the test was read. The README's table was chosen"
        " after it: until then the README had the gains with all weights trained alone, those over the control too."
        " Figures are of the test patients, means over the seeds with 95 % t-intervals over them (of so few seeds"
        " such intervals are wide, and not cut at 0 or 1), unless a table says otherwise. The command and the"
        " machine below are those"
        " of the reading; the trainings were worked off in several sittings whose machines were not recorded."
        f" {revision_note(results['revisions'])}\n\n{GLOSSARY}"
    )


def _figure_table(results: Results, level: str, figure: str) -> str:
    plan = results["plan"]
    rows = []
    for mode, rates in plan["grid"][level].items():
        for rate in rates:
            cells = []
            for pretext in plan["pretexts"]:
                runs = select(results, level=level, mode=mode, rate=rate, pretext=pretext)
                labels = runs[0]["labels"]
                cells.append(with_interval(over_seeds([run["test"][figure] for run in runs])))
            rows.append((MODES[mode], f"{labels} ({rate} %)", *cells))
    constant = results["frequencies"][level][figure]
    told = {
        "mAP": f"mAP over the injury classes and any injury (higher is better; chance {constant:.3f})",
        "score": f"RSNA score (lower is better; each group's best constant in hindsight {constant:.3f})",
    }
    return f"{told[figure]}:\n\n" + table(("fine-tuned", "labels", *map(name_of, plan["pretexts"])), rows)


def _auc_table(results: Results, level: str) -> str:
    plan, rows = results["plan"], []
    groups: list[str] = []
    for rate in [rate for rate in plan["grid"][level]["full"] if rate in AUC_RATES]:
        for pretext in plan["pretexts"]:
            runs = select(results, level=level, mode="full", rate=rate, pretext=pretext)
            groups = list(runs[0]["test"]["auc"])
            values = [[run["test"]["auc"][group] for run in runs] for group in groups]
            cells = ["undefined" if None in one else with_interval(over_seeds(one)) for one in values]
            rows.append((f"{runs[0]['labels']} ({rate} %)", name_of(pretext), *cells))
    head = ("labels", "pretraining", *(group.replace("_", " ") for group in groups))
    return "AUC of injured against healthy, by group, all weights fine-tuned:\n\n" + table(head, rows)


def _difference_table(results: Results, level: str) -> str:
    own = [c for c in results["comparisons"] if c["level"] == level and c["one"] in results["plan"]["pretexts"]]
    rows = [
        (MODES[c["mode"]], f"{c['rate']} %", f"{name_of(c['one'])} - {name_of(c['two'])}", *comparison_cells(c))
        for c in own
    ]
    told = (
        "Differences, paired: by seed (t-interval and paired t-test over the seeds) and by patient (bootstrap of the"
        " test patients, of the mean over the seeds). Above 0 is better in mAP, below 0 in the score. p values are not"
        " corrected for the number of comparisons."
    )
    return f"{told}\n\n" + table(("fine-tuned", "labels", "compared", *COMPARED), rows)


def _health(results: Results) -> str:
    rows = [
        (name_of(name), *(with_interval(found[key]) for key in HEALTH), f"{found['core_seconds']['mean']:.0f}")
        for name, found in results["health"].items()
    ]
    slices = results["plan"]["fine_tuning"]["num_slices"]
    constant = float(np.abs(np.linspace(0, 1, slices) - 0.5).mean())
    told = (
        "Health of the pretrained networks on the validation volumes. Position accuracy: share of random crops whose"
        f" most similar base crop is the one they overlap most (without looking, of the same windows:"
        f" {baselines_text(results['position_baselines'])}; student against teacher, but the control, which has none,"
        " against itself, so that its figure is not comparable); embedding spread: one minus"
        " the mean cosine between base crops, 0 is collapse; organ-presence AUC: a ridge regression on frozen features"
        " of slices, between patients; slice-height error: of nearest neighbours, in fractions of the volume,"
        f" {constant:.3f} is what a constant scores with {slices} slices."
    )
    return f"### Health\n\n{told}\n\n" + table(("pretraining", *HEALTH.values(), "core-seconds"), rows)


def _validation(results: Results) -> str:
    plan = results["plan"]
    rows = []
    for level, modes in plan["grid"].items():
        for rate in modes["full"]:
            found = [select(results, level=level, mode="full", rate=rate, pretext=p) for p in plan["pretexts"]]
            cells = [f"{over_seeds([run['validation']['mAP'] for run in runs])['mean']:.3f}" for runs in found]
            rows.append((level, f"{rate} %", *cells))
    head = ("level", "labels", *map(name_of, plan["pretexts"]))
    return "Validation mAP, all weights fine-tuned (nothing was selected by it but variants):\n\n" + table(head, rows)
