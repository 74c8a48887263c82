# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the label-efficiency study found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import table

from .decisions import Results, find_comparison, helps, hurts, judge_variants
from .figures import over_seeds
from .plan import FIRST_LEVEL
from .plots import draw
from .pretexts import CONTROL

TITLE = "What pretraining buys: label efficiency on synthetic patients"
COMMAND = (
    "python -m benchmarks.label_efficiency --work out/label_efficiency && python -m benchmarks.label_efficiency"
    " --work out/label_efficiency --read-test --out benchmarks/results/label_efficiency.json"
)
NAMES = {
    "scratch": "scratch",
    "v1": "VoCo v1",
    "v2": "VoCo v2",
    CONTROL: "instance contrast (control)",
    "momentum_ramp": "teacher momentum 0.99 to 0.999",
    "one_sided_reg": "one-sided regulariser",
    "hard_clamp": "hard clamp",
    "intensity": "intensity augmentation of random crops",
    "slices_4": "4 slices a step",
    "slice_height": "slice-height term added",
}
MODES = {"full": "all weights", "last": "last blocks", "frozen": "frozen backbone"}
AUC_RATES = (25, 100)
HEALTH = {
    "position_accuracy": "position accuracy",
    "embedding_spread": "embedding spread",
    "organ_auc": "organ-presence AUC",
    "slice_height_error": "slice-height error",
}
plots = draw


def name_of(pretext: str) -> str:
    """What a reader calls it."""
    return NAMES.get(pretext, pretext)


def with_interval(value: Mapping[str, Any], signed: bool = False) -> str:
    """``0.512 (0.498 to 0.526)``; no interval where one seed gives none."""
    sign = "+" if signed else ""
    text = f"{value['mean']:{sign}.3f}"
    return text if value["low"] is None else f"{text} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def each(values: Sequence[float], signed: bool = False) -> str:
    """The seeds' own values."""
    return ", ".join(f"{value:{'+' if signed else ''}.3f}" for value in values)


def select(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """Runs with these values, by seed."""
    found = [run for run in results["runs"] if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


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
    parts += [_verdict(results), _variants(results), _health(results), _validation(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    plan = results["plan"]
    data, fine = plan["data"], plan["fine_tuning"]
    splits = {name: split["patients"] for name, split in data["splits"].items()}
    side, depth = data["size"], data["depth"]
    pretraining, seeds, hours = plan["pretraining"], len(plan["seeds"]), results["core_seconds"] / 3600
    steps = fine["steps"].values()
    return (
        f"**Synthetic patients** of the demo's generator, {depth} slices of {side} x {side} pixels, prevalence"
        f" {data['prevalence']:g} in each group; timm's `{plan['backbone']}`, far smaller than the bundles' backbone."
        f" {splits['pool']} volumes for pretraining, the labelled {data['labelled']} among them, {splits['validation']}"
        f" for validation, {splits['test']} for the test, which was read once. {pretraining['steps']} steps of"
        f" {pretraining['batch_size']} volumes of pretraining; fine-tuning of {min(steps)} to {max(steps)} steps of"
        f" {fine['batch_size']}. {seeds} seeds, of pretraining, subset and fine-tuning together; {hours:.1f} core-hours"
        " in all. Everything was fixed in `benchmarks/label_efficiency/plan.json` before the first run. Figures are of"
        " the test patients, means over the seeds with 95 % t-intervals over them (of so few seeds such intervals are"
        " wide), unless a table says otherwise."
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


def _comparison_cells(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    seeds, low, high = comparison["test_mAP"], *comparison["patients"]
    p = "-" if seeds["p"] is None else f"{seeds['p']:.3f}"
    return (
        with_interval(seeds, signed=True),
        p,
        f"{low:+.3f} to {high:+.3f}",
        each(seeds["values"], signed=True),
        with_interval(comparison["test_score"], signed=True),
    )


COMPARED = ("mAP: difference (interval over seeds)", "p", "interval over patients", "each seed", "score: difference")


def _difference_table(results: Results, level: str) -> str:
    own = [c for c in results["comparisons"] if c["level"] == level and c["one"] in results["plan"]["pretexts"]]
    rows = [
        (MODES[c["mode"]], f"{c['rate']} %", f"{name_of(c['one'])} - {name_of(c['two'])}", *_comparison_cells(c))
        for c in own
    ]
    told = (
        "Differences, paired: by seed (t-interval and paired t-test over the seeds) and by patient (bootstrap of the"
        " test patients, of the mean over the seeds). Above 0 is better in mAP, below 0 in the score. p values are not"
        " corrected for the number of comparisons."
    )
    return f"{told}\n\n" + table(("fine-tuned", "labels", "compared", *COMPARED), rows)


def _count(comparisons: Sequence[Mapping[str, Any]], one: str, two: str) -> str:
    own = [c for c in comparisons if (c["one"], c["two"]) == (one, two)]
    better, worse = [helps(c) for c in own], [hurts(c) for c in own]
    sums = {
        word: tuple(sum(found[key] for found in side) for key in ("seeds", "patients"))
        for word, side in (("above", better), ("below", worse))
    }
    positive = sum(c["test_mAP"]["mean"] > 0 for c in own)
    return (
        f"- {name_of(one)} against {name_of(two)}: better in {positive} of {len(own)} means; the interval over seeds"
        f" lies above 0 in {sums['above'][0]} and below in {sums['below'][0]}, that over patients above in"
        f" {sums['above'][1]} and below in {sums['below'][1]}."
    )


def _verdict(results: Results) -> str:
    names = [name for name in results["plan"]["pretexts"] if name != "scratch"]
    pairs = [(name, "scratch") for name in names] + [(name, CONTROL) for name in names if name != CONTROL]
    lines = [_count(results["comparisons"], *pair) for pair in pairs]
    return "### What the comparisons say\n\nOver all levels, modes and numbers of labels:\n\n" + "\n".join(lines)


def _variants(results: Results) -> str:
    rows = []
    for comparison in [c for c in results["comparisons"] if c["one"] in results["plan"]["variants"]]:
        validation = with_interval(comparison["validation_mAP"], signed=True)
        rows.append(
            (name_of(comparison["one"]), f"{comparison['rate']} %", validation, *_comparison_cells(comparison)[:4])
        )
    if not rows:
        return ""
    judged = [
        (
            name_of(one["variant"]),
            f"{one['validation']:+.3f}",
            "-" if one["spread"] is None else f"{one['spread']:.3f}",
            f"{one['test']:+.3f}",
            "becomes the default" if one["default"] else "stays an option",
        )
        for one in judge_variants(results)
    ]
    return (
        f"### One option changed at a time, from VoCo v2 (level {FIRST_LEVEL}, all weights)\n\n"
        + table(("option", "labels", "validation mAP: difference", *(f"test {word}" for word in COMPARED[:4])), rows)
        + "\n\nThe rule of the plan: the default changes where the gain in validation mAP, averaged over the numbers of"
        " labels, is larger than its standard deviation over the seeds, and the test agrees.\n\n"
        + table(("option", "gain on validation", "its spread", "gain on test", "so it"), judged)
    )


def _health(results: Results) -> str:
    rows = [
        (name_of(name), *(with_interval(found[key]) for key in HEALTH), f"{found['core_seconds']['mean']:.0f}")
        for name, found in results["health"].items()
    ]
    bases = results["plan"]["pretraining"]["grid_size"] ** 2
    told = (
        "Health of the pretrained networks on the validation volumes. Position accuracy: share of random crops whose"
        f" most similar base crop is the one they overlap most (chance about 1 in {bases}); embedding spread: one minus"
        " the mean cosine between base crops, 0 is collapse; organ-presence AUC: a ridge regression on frozen features"
        " of slices, between patients; slice-height error: of nearest neighbours, in fractions of the volume, 0.25 is"
        " what a constant scores."
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


def _gain(results: Results, one: str, two: str, rate: int) -> str | None:
    found = find_comparison(results, level=FIRST_LEVEL, mode="full", rate=rate, one=one, two=two)
    if found is None:
        return None
    value = found["test_mAP"]
    interval = "" if value["low"] is None else f" ({value['low']:+.3f} to {value['high']:+.3f})"
    return f"{value['mean']:+.3f}{interval}"


def headline(results: Results) -> str | None:
    """Gains in test mAP over scratch, and over the control, with their intervals over seeds."""
    plan, rates = results["plan"], (25, 100)
    wanted = [("v2", "scratch"), ("v1", "scratch"), ("v2", CONTROL), ("v1", CONTROL)]
    told = {pair: [_gain(results, *pair, rate) for rate in rates] for pair in wanted}
    if any(gain is None for gains in told.values() for gain in gains):
        return None
    texts = {pair: f"{gains[0]} and {gains[1]}" for pair, gains in told.items()}
    labelled, seeds = plan["data"]["labelled"], len(plan["seeds"])
    return (
        f"Label efficiency, synthetic patients, `{plan['backbone']}`, all weights fine-tuned: at 25 and 100 % of"
        f" {labelled} labels VoCo v2 changes test mAP over training from scratch by {texts['v2', 'scratch']}, v1 by"
        f" {texts['v1', 'scratch']}; over a control that sees the same crops without positions, v2"
        f" {texts['v2', CONTROL]}, v1 {texts['v1', CONTROL]} (95 % intervals over {seeds} seeds;"
        f" {results['machine']['cpu']})."
    )
