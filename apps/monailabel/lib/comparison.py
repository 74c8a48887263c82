# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a new version is better than the one in use, by the bundle's evaluation on the patients that are held out.

The figure is the bundle's ``score`` (the RSNA 2023 score, a mean of weighted log losses: lower is better).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import Conflict, few

__all__ = ["Score", "decide", "read_score"]

NAMED = 6  # classes that a reason lists


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Args:
        value: lower is better. patients: that it is of.
        undefined: terms without a single label, which are no part of it. absent: classes that no patient has.
    """

    value: float
    patients: int
    undefined: tuple[str, ...] = ()
    absent: tuple[str, ...] = field(default=())

    def caveats(self) -> str:
        """What to know before much is made of it, "" if nothing."""
        said = []
        if self.patients == 1:
            said.append("a single patient is held out, so that the difference may be chance: label more")
        if self.undefined:
            said.append(f"not scored for want of labels: {few(self.undefined, NAMED)}")
        if self.absent:
            said.append(f"nobody held out has {few(self.absent, NAMED)}")
        return "; ".join(said)


def read_score(run: Path) -> Score:
    """The score of a run of the bundle's ``evaluate.json``.

    Raises:
        Conflict: if the labels of the patients define none.
    """
    try:
        figures = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        value = figures["score"]["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Conflict("the evaluation left no score: no patient that is held out has a label") from error
    if value is None:
        raise Conflict("the score is not defined by the labels of the patients that are held out")
    terms, classes = figures.get("score_terms", {}), figures.get("classes", {})
    undefined = tuple(name for name, figure in terms.items() if _value(figure) is None)
    absent = tuple(name for name, row in classes.items() if row.get("labelled") and not row.get("positives"))
    return Score(float(value), int(figures["patients"]), undefined, absent)


def decide(new: Score, current: Score | None, name: str | None, note: str = "") -> tuple[bool, str]:
    """Whether the new version is used from now on, and why or why not.

    Args:
        new: of the new version. current: of the one in use; None if it could not be scored.
        name: of the version in use; None if there is none.
        note: what else to say, such as why `current` is None.
    """
    of = f"score {new.value:.4f} on {new.patients} patients held out (lower is better)"
    if name is None:
        chosen, verdict = True, f"the first weights: {of}"
    elif current is None:
        chosen, verdict = False, f"not chosen: {of}, and version {name} could not be scored"
    elif new.value < current.value:
        chosen, verdict = True, f"better: {of}, version {name} has {current.value:.4f}"
    elif new.value == current.value:
        chosen, verdict = False, f"not chosen: {of}, no better than version {name}, which has the same"
    else:
        chosen, verdict = False, f"not chosen: {of}, version {name} has {current.value:.4f}"
    return chosen, "; ".join(text for text in (verdict, note, new.caveats()) if text)


def _value(figure: Any) -> Any:
    return figure.get("value") if isinstance(figure, Mapping) else figure
