# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the comparisons of the label-efficiency study say, with what they cannot say; the README's sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import table

from .decisions import (
    Results,
    above_by_chance,
    control_is_no_worse,
    find_comparison,
    helps,
    hurts,
    judge_variants,
    odds_of_a_null_variant,
    select,
)
from .figures import over_seeds
from .plan import FIRST_LEVEL
from .pretexts import CONTROL
from .wording import COMPARED, MODES, comparison_cells, name_of, with_interval

Comparison = Mapping[str, Any]
HEADLINE_RATES = (25, 100)


def where(comparison: Comparison) -> str:
    """Level, way of fine-tuning and labels of a comparison."""
    return f"{comparison['level']}, {MODES[comparison['mode']]}, {comparison['rate']} %"


def _listed(comparisons: Sequence[Comparison]) -> str:
    return "; ".join(map(where, comparisons)) or "none"


def _cells(own: Sequence[Comparison], found: Callable[[Comparison], Mapping[str, bool]]) -> str:
    seeds = [c for c in own if found(c)["seeds"]]
    patients = [c for c in own if found(c)["patients"] and not found(c)["seeds"]]
    return f"over seeds: {_listed(seeds)}; over patients only: {_listed(patients)}"


def pair_verdict(results: Results, one: str, two: str) -> str:
    """Which cells of a pair are above or below 0, and by which interval."""
    own = [c for c in results["comparisons"] if (c["one"], c["two"]) == (one, two)]
    positive = sum(c["test_mAP"]["mean"] > 0 for c in own)
    return (
        f"- {name_of(one)} against {name_of(two)}: better in {positive} of {len(own)} means."
        f"\n  - above 0 {_cells(own, helps)}\n  - below 0 {_cells(own, hurts)}"
    )


def ascription(results: Results, one: str) -> str:
    """Which gains over the control can be ascribed to the position task."""
    own = [c for c in results["comparisons"] if (c["one"], c["two"]) == (one, CONTROL) and helps(c)["seeds"]]
    to_position = [c for c in own if control_is_no_worse(results, c)]
    rest = [c for c in own if c not in to_position]
    return (
        f"- {name_of(one)}: a gain over the control (above 0 over seeds) is ascribed to the position task in:"
        f" {_listed(to_position)}; not in: {_listed(rest)}."
    )


def verdict(results: Results) -> str:
    """What the comparisons of the pretexts say."""
    names = [name for name in results["plan"]["pretexts"] if name != "scratch"]
    told = [name for name in names if name != CONTROL]
    pairs = [(name, "scratch") for name in names] + [(name, CONTROL) for name in told]
    number = sum((c["one"], c["two"]) in pairs for c in results["comparisons"])
    chance, seeds = above_by_chance(number), len(results["plan"]["seeds"])
    return "\n\n".join([
        "### What the comparisons say",
        "All of it is of test mAP (the tables above have the score too). Each cell is a level, a way of fine-tuning and"
        f" a share of the labels. Intervals over seeds are of {seeds}"
        " trained networks a side, on these test patients; intervals over patients hold those networks fixed and say"
        " nothing of another seed: what is above 0 \"over patients only\" may be these networks' luck. The cells are"
        " not independent: they share pretrained networks and test patients. Were no pretext different, of these"
        f" {number} comparisons about {chance:.1f} would lie above 0 by chance, and as many below, by intervals over"
        " seeds.",
        "\n".join(pair_verdict(results, *pair) for pair in pairs),
        "The control makes crops of one volume alike, wherever in it they lie, without augmentation: it trains features"
        " **not** to tell positions apart, and is no neutral stand-in for pretraining. So a gain over it is ascribed to"
        " the position task only where the control itself is at least as good as training from scratch (in the mean).",
        "\n".join(ascription(results, name) for name in told),
    ])  # fmt: skip


def variants(results: Results) -> str:
    """Each option beside v2, and the plan's rule with its odds."""
    left_out = ", ".join(map(name_of, results["without"]))
    without = f"Left out, as runs are missing: {left_out}." if left_out else ""
    rows = []
    for comparison in [c for c in results["comparisons"] if c["one"] in results["plan"]["variants"]]:
        validation = with_interval(comparison["validation_mAP"], signed=True)
        rows.append(
            (name_of(comparison["one"]), f"{comparison['rate']} %", validation, *comparison_cells(comparison)[:4])
        )
    if not rows:
        return without
    judged = [
        (
            name_of(one["variant"]),
            f"{one['validation']:+.3f}",
            "-" if one["spread"] is None else f"{one['spread']:.3f}",
            f"{one['test']:+.3f}",
            "passes the plan's rule" if one["passes"] else "does not pass",
        )
        for one in judge_variants(results)
    ]
    return "\n\n".join(part for part in [
        f"### One option changed at a time, from VoCo v2 (level {FIRST_LEVEL}, all weights)",
        table(("option", "labels", "validation mAP: difference", *(f"test {word}" for word in COMPARED[:4])), rows),
        _rule(results, len(judged)),
        table(("option", "gain on validation", "its spread", "gain on test", "so it"), judged),
        without,
    ] if part)  # fmt: skip


def _rule(results: Results, number: int) -> str:
    seeds = len(results["plan"]["seeds"])
    told = (
        "The rule of the plan: an option passes where its gain in validation mAP, averaged over the numbers of labels,"
        " is larger than that gain's standard deviation over the seeds, and the gain on the test is above 0."
    )
    if seeds > 1:
        odds = odds_of_a_null_variant(seeds)
        told += (
            f" That is a weak rule: with {seeds} seeds an option without any effect has a gain above its spread with"
            f" probability {odds:.2f} before the look at the test's sign, so {number * odds:.1f} of {number} do."
        )
    return (
        f"{told} Options were never tried two together, and the test figure of an option that was picked for passing is"
        " biased upward."
    )


def _headline_rows(results: Results) -> list[tuple[str, ...]] | None:
    rows = []
    for mode in ("full", "frozen"):
        for rate in HEADLINE_RATES:
            place = {"level": FIRST_LEVEL, "mode": mode, "rate": rate}
            found = [find_comparison(results, **place, one=one, two="scratch") for one in ("v1", "v2", CONTROL)]
            runs = select(results, **place, pretext="scratch")
            if not runs or None in found:
                return None
            gains = [with_interval(one["test_mAP"], signed=True) for one in found if one is not None]
            scratch = over_seeds([run["test"]["mAP"] for run in runs])
            rows.append((f"{MODES[mode]}, {runs[0]['labels']} labels", f"{scratch['mean']:.3f}", *gains))
    return rows


def headline(results: Results) -> str | None:
    """Test mAP from random weights, and what both forms of VoCo and the control change of it, where all weights are
    trained and where the backbone is frozen."""
    plan, rows = results["plan"], _headline_rows(results)
    if rows is None:
        return None
    head = ("trained", "from random weights", "change by VoCo v1", "change by VoCo v2", "change by the control")
    return (
        f"Label efficiency on synthetic patients of easy injuries (conspicuity {plan['levels'][FIRST_LEVEL]:.1f}),"
        f" `{plan['backbone']}`: test mAP (chance {results['frequencies'][FIRST_LEVEL]['mAP']:.3f}), mean with 95 %"
        f" interval over {len(plan['seeds'])} seeds ({results['machine']['cpu']}). The control makes the same crops"
        f" alike wherever they lie.\n\n{table(head, rows)}\n"
    )
