# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's inference tasks: one image, and all images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from .bundles import CLASSIFIER, Setup
from .errors import AppError, Conflict
from .inference import Prediction, entropy, label_table, predict
from .versions import ModelVersions

__all__ = ["InjuryBatchInfer", "InjuryInferTask"]

logger = logging.getLogger(__name__)


class InjuryInferTask(InferTask):
    """Inference of the classifier's version in use.

    Args:
        setup: where the bundle is.
        versions: of the classifier.
    """

    def __init__(self, setup: Setup, versions: ModelVersions) -> None:
        self.setup, self.versions = setup, versions
        self.table = label_table(setup)
        super().__init__(
            type=InferType.CLASSIFICATION,
            labels=list(self.table.columns),
            dimension=3,
            description="Probabilities of injuries in an abdominal CT, with the evidence for each",
            config={"evidence": False, "tta": []},
        )

    def is_valid(self) -> bool:
        """Always listed: without weights it says what to do."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The weights in use; None without any."""
        try:
            return str(self.versions.current().weights)
        except Conflict:
            return None

    def info(self) -> dict[str, Any]:
        """As all of MONAI Label's models, and the version in use."""
        try:
            version = self.versions.current().name
        except Conflict:
            version = None
        groups = {group.name: [item.name for item in group.classes] for group in self.table.groups}
        return {**super().info(), "version": version, "groups": groups}

    def predict(self, image: Path, name: str, params: Mapping[str, Any]) -> tuple[Prediction, str]:
        """The prediction of a series and the version that made it; raises as `inference.predict`.

        Args:
            image: folder of a DICOM series, or NIfTI file.
            name: of the image in messages.
            params: as `request_params.inference_params` gives them.
        """
        version = self.versions.current()
        options = {key: params[key] for key in ("device", "tta") if key in params}
        evidence = bool(params.get("evidence", False))
        return predict(self.setup, image, version.weights, evidence=evidence, options=options, name=name), version.name

    def __call__(self, request: Mapping[str, Any]) -> tuple[None, dict[str, Any]]:
        """No file, and the reply, for `image` (a path) named `image_id`."""
        start = time.perf_counter()
        prediction, version = self.predict(Path(request["image"]), request["image_id"], request)
        flat = [(f"{group}_{name}", p) for group, classes in prediction.probabilities.items()
                for name, p in classes.items()]  # fmt: skip
        return None, {
            "prediction": [{"idx": idx, "label": label, "score": p} for idx, (label, p) in enumerate(flat)],
            "label_names": {label: idx for idx, (label, _) in enumerate(flat)},
            "injuries": prediction.probabilities,
            "any_injury": prediction.any_injury,
            "entropy": entropy(prediction.probabilities),
            "evidence": prediction.evidence,
            "model": CLASSIFIER,
            "version": version,
            "latencies": {"total": round(time.perf_counter() - start, 3)},
        }


class InjuryBatchInfer(BatchInferTask):
    """Every image, one after the other; one that cannot be read does not end it (MONAI Label's own would)."""

    def __call__(
        self, request: dict[str, Any], datastore: Datastore, infer: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Result by image: the label's id and the prediction, or `error`.

        Raises:
            AppError: if there are images and all failed; the first reason.
        """
        images = sorted(self.get_images(request, datastore))
        images = images[: request.get("max_batch_size") or len(images)]
        results: dict[str, Any] = {}
        # not the errors themselves, which hold what the failed run had in memory
        failed: list[tuple[type[AppError], str]] = []
        for number, image in enumerate(images, start=1):
            try:
                result = infer({**request, "image": image, "save_label": True}, datastore)
                results[image] = {key: result[key] for key in ("label", "tag", "params")}
                logger.info("%d of %d: %s", number, len(images), image)
            except Exception as error:
                kind, message = _kind(error)
                failed.append((kind, message))
                results[image] = {"error": message}
                logger.error("%d of %d: %s: %s", number, len(images), image, message,
                             exc_info=None if isinstance(error, AppError) else error)  # fmt: skip
        logger.info("batch inference: %d of %d images, %d failed", len(images) - len(failed), len(images), len(failed))
        if failed and len(failed) == len(images):
            kind, message = failed[0]
            raise kind(f"all {len(failed)} images failed; the first: {message}")
        return results


def _kind(error: Exception) -> tuple[type[AppError], str]:
    """What to say of an error; one that is none of ours may hold paths."""
    if isinstance(error, AppError):
        return type(error), error.msg
    return AppError, f"failed with {type(error).__name__}; the server's log says why"
