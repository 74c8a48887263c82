# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the plan's rules say of the results: which variant passes, where pretraining is said to help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from .figures import CONFIDENCE
from .plan import FIRST_LEVEL
from .pretexts import CONTROL
from .read_test import REFERENCE

Results = Mapping[str, Any]


def select(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """Runs with these values, by seed."""
    found = [run for run in results["runs"] if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def find_comparison(results: Results, **wanted: Any) -> dict[str, Any] | None:
    """The comparison with these values of level, mode, rate, one and two; None where it was not made."""
    return next((c for c in results["comparisons"] if all(c[key] == value for key, value in wanted.items())), None)


def helps(comparison: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the difference in test mAP is above 0 with its whole interval over seeds, and over patients."""
    over_seeds, over_patients = comparison["test_mAP"]["low"], comparison["patients"][0]
    return {"seeds": over_seeds is not None and over_seeds > 0, "patients": over_patients > 0}


def hurts(comparison: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the difference in test mAP is below 0 with its whole interval over seeds, and over patients."""
    over_seeds, over_patients = comparison["test_mAP"]["high"], comparison["patients"][1]
    return {"seeds": over_seeds is not None and over_seeds < 0, "patients": over_patients < 0}


def control_is_no_worse(results: Results, comparison: Mapping[str, Any]) -> bool:
    """Whether the control's mean is at least that of scratch where this comparison was made. Elsewhere the control is
    harmful, and a gain over it shows nothing of the position task."""
    where = {key: comparison[key] for key in ("level", "mode", "rate")}
    found = find_comparison(results, one=CONTROL, two="scratch", **where)
    return found is not None and found["test_mAP"]["mean"] >= 0


def above_by_chance(comparisons: int) -> float:
    """How many intervals are expected to lie above 0 (and as many below) where nothing differs."""
    return comparisons * (1 - CONFIDENCE) / 2


def odds_of_a_null_variant(seeds: int) -> float:
    """Probability that the mean gain over the seeds exceeds its standard deviation where there is no gain: then the t
    statistic exceeds the root of the number of seeds."""
    return float(stats.t.sf(np.sqrt(seeds), seeds - 1))


def judge_variants(results: Results) -> list[dict[str, Any]]:
    """Of each variant that was run at all rates: gain over the reference in mAP, averaged over the rates.

    Returns:
        ``variant``, ``validation`` (mean over seeds), ``spread`` (standard deviation over seeds of that gain),
        ``test`` (mean over seeds) and ``passes``: whether it passes the plan's rule.
    """
    found = []
    plan = results["plan"]
    for variant in plan["variants"]:
        wanted = {"level": FIRST_LEVEL, "mode": "full", "one": variant, "two": REFERENCE}
        made = [find_comparison(results, rate=rate, **wanted) for rate in plan["variant_rates"]]
        compared = [one for one in made if one is not None]
        if len(compared) < len(made):
            continue
        by_seed = {
            split: np.mean([one[f"{split}_mAP"]["values"] for one in compared], axis=0)
            for split in ("validation", "test")
        }
        gain, test = float(by_seed["validation"].mean()), float(by_seed["test"].mean())
        spread = float(by_seed["validation"].std(ddof=1)) if len(by_seed["validation"]) > 1 else None
        passes = spread is not None and gain > spread and test > 0
        found.append({"variant": variant, "validation": gain, "spread": spread, "test": test, "passes": passes})
    return found
