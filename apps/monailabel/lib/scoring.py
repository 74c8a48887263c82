# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How uncertain the classifier is about each image that has no label yet, as a background task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.tasks.scoring import ScoringMethod

from .errors import AppError, Unusable
from .store import SeriesStore
from .strategies import noted_entropy

__all__ = ["EntropyScoring"]

logger = logging.getLogger(__name__)


class EntropyScoring(ScoringMethod):
    """Notes the entropy of the prediction of each image without a final label that the current version has not scored.

    An image that cannot be read gets the note ``failed`` instead, and is tried again in the next run: somebody may have
    repaired it.

    Args:
        current: the version of the weights in use (``name`` and ``weights``).
        predict: `lib.inference.predict` for a setup: prediction of an image by weights; `name` is for messages.
        entropy: of probabilities by group and class, from 0 (sure) to 1.
    """

    def __init__(
        self,
        current: Callable[[], Any],
        predict: Callable[..., Any],
        entropy: Callable[[Mapping[str, Mapping[str, float]]], float],
    ) -> None:
        super().__init__("Entropy over the groups of the prediction")
        self._current = current
        self._predict = predict
        self._entropy = entropy

    def __call__(self, request: Mapping[str, Any], datastore: SeriesStore) -> dict[str, Any]:
        """What was done: ``version``, ``scored`` and ``already`` (counts) and ``failed`` (message by image).

        Raises:
            Conflict: there are no weights, or notes cannot be written.
            Unusable: images were tried, and there is none that has a score of this version.
        """
        version = self._current()
        images = datastore.get_unlabeled_images()
        todo = [image for image in images if not _is_scored(datastore.get_image_info(image), version.name)]
        done: dict[str, Any] = {"version": version.name, "scored": 0, "already": len(images) - len(todo), "failed": {}}
        logger.info(
            "entropy by version %s: %d images to score, %d already are", version.name, len(todo), done["already"]
        )
        if todo:
            datastore.update_image_info(todo[0], {})  # if nothing can be noted, say so before the work
        for number, image in enumerate(todo, 1):
            try:
                value = self._score(datastore, image, version)
                logger.info("%d of %d: %s: entropy %.4f", number, len(todo), image, value)
                done["scored"] += 1
            except AppError as error:
                logger.warning("%d of %d: %s failed: %s", number, len(todo), image, error)
                done["failed"][image] = str(error)
                _note_failure(datastore, image, error)
        if done["failed"] and not done["scored"] + done["already"]:
            first, message = next(iter(done["failed"].items()))
            raise Unusable(f"none of {len(todo)} images could be scored; the first, {first}: {message}")
        return done

    def _score(self, datastore: SeriesStore, image: str, version: Any) -> float:
        probabilities = self._predict(datastore.path(image), version.weights, name=image).probabilities
        value = float(self._entropy(probabilities))
        datastore.update_image_info(image, {"entropy": value, "entropy_version": version.name,
                                            "probabilities": probabilities, "failed": None})  # fmt: skip
        return value


def _is_scored(notes: Mapping[str, Any], version: str) -> bool:
    return noted_entropy(notes) is not None and notes.get("entropy_version") == version


def _note_failure(datastore: SeriesStore, image: str, error: AppError) -> None:
    """Only what is wrong with the image itself is noted: a server that is down says nothing about it."""
    if isinstance(error, Unusable):
        scores = dict.fromkeys(("entropy", "entropy_version", "probabilities"))
        datastore.update_image_info(image, {"failed": str(error), **scores})
