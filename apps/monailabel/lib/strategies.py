# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which image to label next: ``first``, ``random`` or ``uncertain``. One that cannot be read is never it."""

from __future__ import annotations

import logging
import math
import random
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

__all__ = ["First", "Random", "Uncertain", "noted_entropy", "strategies"]

logger = logging.getLogger(__name__)


def strategies() -> dict[str, Strategy]:
    """All of them by name."""
    return {"first": First(), "random": Random(), "uncertain": Uncertain()}


def noted_entropy(notes: Mapping[str, Any]) -> float | None:
    """The entropy in an image's notes; None if it has not been scored."""
    value = notes.get("entropy")  # anybody may note anything through the API
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


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
    """The one with the largest entropy; those that have not been scored yet come after the scored ones."""

    def __init__(self) -> None:
        super().__init__("Most uncertain image without a label")

    def choose(self, notes: Mapping[str, Mapping[str, Any]], strategy: str) -> str:
        def rank(image: str) -> float:
            entropy = noted_entropy(notes[image])
            return -1.0 if entropy is None else entropy

        return max(notes, key=rank)  # the first of equals, so the answer is the same each time


def _proposed(notes: Mapping[str, Any], strategy: str) -> float:
    """When MONAI Label noted that it proposed this image by this strategy, in seconds; 0 for never."""
    noted = notes.get("strategy")
    noted = noted.get(strategy) if isinstance(noted, Mapping) else None
    when = noted.get("ts") if isinstance(noted, Mapping) else None
    return float(when) if isinstance(when, int | float) and math.isfinite(when) else 0.0
