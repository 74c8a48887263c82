# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan, and the pieces of work that follow from it in the order of their importance."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN = Path(__file__).with_name("plan.json")
FIRST_LEVEL = "plain"  # where networks are pretrained and variants compared
WORKER_THREADS = 1  # of each process that trains
Plan = dict[str, Any]


def load_plan(smoke: bool = False) -> Plan:
    """The committed plan; for a smoke run everything in it as small as it goes, with every path kept."""
    plan = json.loads(PLAN.read_text(encoding="utf-8"))
    return shrink(plan) if smoke else plan


def shrink(plan: Plan) -> Plan:
    """A plan of seconds: one seed, two rates, one variant, a dozen patients of few slices."""
    small = copy.deepcopy(plan)
    small |= {"seeds": [0], "variant_rates": [100], "bootstrap": 50}
    small["data"] |= {"labelled": 8, "depth": 8, "size": 48}
    for split, patients in (("pool", 10), ("validation", 8), ("test", 12)):
        small["data"]["splits"][split]["patients"] = patients
    small["variants"] = {name: plan["variants"][name] for name in ("slice_height",)}
    small["pretexts"] = {name: plan["pretexts"][name] for name in ("scratch", "v2", "instance_contrast")}
    small["pretraining"] |= {"steps": 1, "batch_size": 2, "num_slices": 2, "hidden_size": 16, "crop_size": 16}
    small["fine_tuning"] |= {"steps": {"50": 1, "100": 1}, "batch_size": 2, "num_slices": 2, "hidden_size": 8}
    small["grid"] = {"plain": {"full": [50, 100], "last": [100], "frozen": [50, 100]}, "harder": {"full": [100]}}
    small["health"] |= {"windows": 2, "slices": 2, "recalibration_volumes": 4}
    return small


@dataclass(frozen=True)
class Task:
    """One piece of work; what it leaves is named by :attr:`names`.

    Args:
        kind: ``data``, ``pretrain`` or ``fine_tune``.
        level: of conspicuity.
        split: of a piece of data.
        pretext, seed: of a network.
        mode, rates: of fine-tuning; rates are percentages of the labelled patients.
    """

    kind: str
    level: str
    split: str = ""
    pretext: str = ""
    seed: int = 0
    mode: str = ""
    rates: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One for each file of results."""
        if self.kind == "data":
            return (f"data-{self.level}-{self.split}",)
        if self.kind == "pretrain":
            return (f"pretrain-{self.pretext}-s{self.seed}",)
        return tuple(run_name(self.level, self.pretext, self.seed, self.mode, rate) for rate in self.rates)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names that must be there before."""
        if self.kind == "data":
            return ()
        if self.kind == "pretrain":
            return tuple(f"data-{self.level}-{split}" for split in ("pool", "validation"))
        data = tuple(f"data-{self.level}-{split}" for split in ("pool", "validation", "test"))
        return (f"pretrain-{self.pretext}-s{self.seed}", *data)


def run_name(level: str, pretext: str, seed: int, mode: str, rate: int) -> str:
    """Name of one fine-tuning."""
    return f"{level}-{pretext}-s{seed}-{mode}-{rate:03d}"


def tasks(plan: Plan) -> list[Task]:
    """All pieces: main runs at the first level seed by seed, then variants, then the other levels."""
    found = _data(FIRST_LEVEL)
    for seed in plan["seeds"]:
        for pretext in plan["pretexts"]:
            found.append(Task("pretrain", FIRST_LEVEL, pretext=pretext, seed=seed))
            found += _fine_tunings(FIRST_LEVEL, pretext, seed, plan["grid"][FIRST_LEVEL])
    for seed in plan["seeds"]:
        for variant in plan["variants"]:
            found.append(Task("pretrain", FIRST_LEVEL, pretext=variant, seed=seed))
            found += _fine_tunings(FIRST_LEVEL, variant, seed, {"full": plan["variant_rates"]})
    for level in [name for name in plan["levels"] if name != FIRST_LEVEL]:
        found += _data(level)
        for seed in plan["seeds"]:
            for pretext in plan["pretexts"]:
                found += _fine_tunings(level, pretext, seed, plan["grid"][level])
    return found


def is_main(plan: Plan, task: Task) -> bool:
    """Whether it belongs to the comparison of the pretexts, rather than to the variants."""
    return task.kind == "fine_tune" and task.pretext in plan["pretexts"]


def _data(level: str) -> list[Task]:
    return [Task("data", level, split) for split in ("pool", "validation", "test")]


def _fine_tunings(level: str, pretext: str, seed: int, modes: dict[str, list[int]]) -> list[Task]:
    found = []
    for mode, rates in modes.items():
        groups = [tuple(rates)] if mode == "frozen" else [(rate,) for rate in rates]  # frozen features serve all rates
        found += [Task("fine_tune", level, pretext=pretext, seed=seed, mode=mode, rates=group) for group in groups]
    return found
