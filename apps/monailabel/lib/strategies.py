# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which image to label next: ``first``, ``random`` or ``uncertain``. One that cannot be read is never it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from .errors import Conflict

__all__ = ["SCORE", "First", "Random", "Uncertain", "noted_entropy", "score_in_use", "score_of", "strategies"]

logger = logging.getLogger(__name__)

SCORE = ("entropy", "entropy_version", "entropy_by", "probabilities")  # the notes of a score


def strategies(
    current: Callable[[], Any] | None = None, settings: Mapping[str, Any] | None = None
) -> dict[str, Strategy]:
    """All of them by name.

    Args:
        current: the version of the weights in use. settings: see `score_of`. Scores by others count less.
    """
    return {"first": First(), "random": Random(), "uncertain": Uncertain(current, settings)}


def score_of(version: Any, settings: Mapping[str, Any]) -> str:
    """What a score is by: the version's name and file, and the settings of its inference. Another file of the same name
    predicts something else.

    Args:
        version: has ``name`` and ``weights``. settings: the user's of the bundle's inference.
    """
    try:
        found = os.stat(version.weights)
        file = [found.st_size, found.st_mtime_ns]
    except OSError:  # the prediction says so
        file = []
    known = json.dumps([file, dict(settings)], sort_keys=True, default=str)
    return f"{version.name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"


def score_in_use(current: Callable[[], Any], settings: Mapping[str, Any]) -> str | None:
    """`score_of` the version in use; None without weights: whatever scored the images is gone."""
    try:
        return score_of(current(), settings)
    except Conflict:
        return None


def noted_entropy(notes: Mapping[str, Any], score_by: str | None = None) -> float | None:
    """The entropy in an image's notes; None if it has not been scored, or not by `score_by` (see `score_of`)."""
    value = notes.get("entropy")  # anybody may note anything through the API
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if score_by is None or notes.get("entropy_by") == score_by else None


class OfUnlabelled(Strategy):
    """One of the images without a label whose notes name no failure."""

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """The reply of ``POST /activelearning/<strategy>``; None if there is no image to label."""
        notes = {image: datastore.get_image_info(image)
                 for image in datastore.get_unlabeled_images(request.get("label_tag"))}  # fmt: skip
        notes = {image: noted for image, noted in notes.items() if not noted.get("failed")}
        if not notes:
            return None
        image = self.choose(notes, str(request.get("strategy", "")))
        logger.info("%s: image %s of %d", self.description, image, len(notes))
        return {"id": image, "entropy": noted_entropy(notes[image]), "unlabelled": len(notes)}

    @abstractmethod
    def choose(self, notes: Mapping[str, Mapping[str, Any]], strategy: str) -> str:
        """The id of one of the images, of which there is one at least."""


class First(OfUnlabelled):
    """The first in the order of the store."""

    def __init__(self) -> None:
        super().__init__("First image without a label")

    def choose(self, notes: Mapping[str, Mapping[str, Any]], strategy: str) -> str:
        return next(iter(notes))


class Random(OfUnlabelled):
    """Any, those more likely that were last proposed long ago, or never."""

    def __init__(self) -> None:
        super().__init__("Random image without a label")

    def choose(self, notes: Mapping[str, Mapping[str, Any]], strategy: str) -> str:
        # not MONAI Label's: it fails when all images were proposed in this very second
        now = time.time()
        weights = [max(1.0, now - _proposed(noted, strategy)) for noted in notes.values()]
        return random.choices(list(notes), weights=weights)[0]


class Uncertain(OfUnlabelled):
    """The one with the largest entropy. Scores by other weights or settings than those in use cannot be compared with
    theirs: those images come after the scored ones, and those that have not been scored at all come last.

    Args:
        current: the version of the weights in use; None takes all scores as equal.
        settings: see `score_of`.
    """

    def __init__(self, current: Callable[[], Any] | None = None, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__("Most uncertain image without a label")
        self._current = current
        self._settings = dict(settings or {})

    def choose(self, notes: Mapping[str, Mapping[str, Any]], strategy: str) -> str:
        score_by = None if self._current is None else score_in_use(self._current, self._settings)

        def rank(image: str) -> tuple[bool, float]:
            entropy = noted_entropy(notes[image])
            return noted_entropy(notes[image], score_by) is not None, -1.0 if entropy is None else entropy

        return max(notes, key=rank)  # the first of equals, so the answer is the same each time


def _proposed(notes: Mapping[str, Any], strategy: str) -> float:
    """When MONAI Label noted that it proposed this image by this strategy, in seconds; 0 for never."""
    noted = notes.get("strategy")
    noted = noted.get(strategy) if isinstance(noted, Mapping) else None
    when = noted.get("ts") if isinstance(noted, Mapping) else None
    return float(when) if isinstance(when, int | float) and math.isfinite(when) else 0.0
