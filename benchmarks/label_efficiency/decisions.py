# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the plan's rules say of the results: which variant becomes the default, where pretraining is said to help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .plan import FIRST_LEVEL
from .read_test import REFERENCE

Results = Mapping[str, Any]


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


def judge_variants(results: Results) -> list[dict[str, Any]]:
    """Of each variant that was run at all rates: gain over the reference in mAP, averaged over the rates.

    Returns:
        ``variant``, ``validation`` (mean over seeds), ``spread`` (standard deviation over seeds of that gain),
        ``test`` (mean over seeds) and ``default``: whether it becomes the default by the plan's rule.
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
        wins = spread is not None and gain > spread and test > 0
        found.append({"variant": variant, "validation": gain, "spread": spread, "test": test, "default": wins})
    return found
