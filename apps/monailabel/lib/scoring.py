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
from .strategies import SCORE, noted_entropy, score_of

__all__ = ["EntropyScoring"]

logger = logging.getLogger(__name__)

GIVE_UP = 10  # images one after the other that fail for a reason which is not their own


class EntropyScoring(ScoringMethod):
    """Notes the entropy of the prediction of each image without a final label, unless the same weights with the same
    settings have scored it before.

    An image that cannot be read gets the note ``failed`` instead, and is tried again in the next run, after the others:
    somebody may have repaired it.

    Args:
        current: the version of the weights in use (``name`` and ``weights``).
        predict: `lib.inference.predict` for a setup: prediction of an image by weights; `name` is for messages.
        entropy: of probabilities by group and class, from 0 (sure) to 1.
        settings: the user's of the bundle's inference: others make other predictions.
    """

    def __init__(
        self,
        current: Callable[[], Any],
        predict: Callable[..., Any],
        entropy: Callable[[Mapping[str, Mapping[str, float]]], float],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__("Entropy over the groups of the prediction")
        self._current = current
        self._predict = predict
        self._entropy = entropy
        self._settings = dict(settings or {})

    @staticmethod
    def check(request: Mapping[str, Any]) -> int | None:
        """How many images at most a run tries, ``max_images`` of the request; None for all. Raises Unusable."""
        number = request.get("max_images")
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise Unusable(f"max_images: expected a whole number from 1, or none for all, got {str(number)[:40]!r}")
        return number

    def __call__(self, request: Mapping[str, Any], datastore: SeriesStore) -> dict[str, Any]:
        """What was done: ``version``, ``scored``, ``already`` and ``left`` (counts), ``failed`` (message by image).

        Raises:
            Unusable: images were tried, and there is none that has a score; or ``max_images`` is no number.
            Conflict: there are no weights, or notes cannot be written.
            AppError: image after image fails for a reason that is not its own, as when the PACS is down.
        """
        limit, version = self.check(request), self._current()
        score_by = score_of(version, self._settings)
        noted = {image: datastore.get_image_info(image) for image in datastore.get_unlabeled_images()}
        todo = [image for image, notes in noted.items() if noted_entropy(notes, score_by) is None]
        todo.sort(key=lambda image: bool(noted[image].get("failed")))  # new ones have their turn where there is a limit
        already, tried = len(noted) - len(todo), todo[:limit]
        logger.info("entropy by version %s: %d of %d images to score, %d already are",
                    version.name, len(tried), len(todo), already)  # fmt: skip
        failed = self._score_all(datastore, tried, version, score_by) if tried else {}
        if failed and len(failed) == len(tried) and not already:
            first, message = next(iter(failed.items()))
            raise Unusable(f"none of {len(tried)} images could be scored; the first, {first}: {message}")
        return {"version": version.name, "scored": len(tried) - len(failed), "already": already,
                "left": len(todo) - len(tried), "failed": failed}  # fmt: skip

    def _score_all(self, datastore: SeriesStore, images: list[str], version: Any, score_by: str) -> dict[str, str]:
        """Message by image that failed."""
        datastore.update_image_info(images[0], {})  # if nothing can be noted, say so before the work
        failed: dict[str, str] = {}
        in_a_row = 0
        for number, image in enumerate(images, 1):
            try:
                value = self._score(datastore, image, version, score_by)
                logger.info("%d of %d: %s: entropy %.4f", number, len(images), image, value)
                in_a_row = 0
            except Unusable as error:
                failed[image] = str(error)
                datastore.update_image_info(image, {**dict.fromkeys(SCORE), "failed": str(error)})
                logger.warning("%d of %d: %s failed: %s", number, len(images), image, error)
                in_a_row = 0
            except Exception as error:  # no fault of the image, so it is not noted: it says nothing about it
                kind, failed[image] = _told(error)
                logger.warning("%d of %d: %s failed: %s", number, len(images), image, failed[image],
                               exc_info=None if isinstance(error, AppError) else error)  # fmt: skip
                in_a_row += 1
                if in_a_row == GIVE_UP:
                    raise kind(
                        f"stopped after {GIVE_UP} images that failed one after the other: {failed[image]}"
                    ) from None
        return failed

    def _score(self, datastore: SeriesStore, image: str, version: Any, score_by: str) -> float:
        probabilities = self._predict(datastore.path(image), version.weights, name=image).probabilities
        value = float(self._entropy(probabilities))
        datastore.update_image_info(image, {"entropy": value, "entropy_version": version.name, "entropy_by": score_by,
                                            "probabilities": probabilities, "failed": None})  # fmt: skip
        return value


def _told(error: Exception) -> tuple[type[AppError], str]:
    """What to say of an error; one that is none of ours may hold paths."""
    if isinstance(error, AppError):
        return type(error), error.msg
    return AppError, f"failed with {type(error).__name__}; the server's log says why"
