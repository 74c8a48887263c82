# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One series through the bundle's own `inference.json`, as it is: the answers are those of the bundle, to the last
digit.

Runs come one after the other, in one thread of their own: a run sets the seeds and the handlers of the log, and a
second thread would double what torch and the allocator keep. Nothing of a run is kept, so that memory stays bounded and
the next run sees a new version of the weights.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from workflow.datalist import DatalistError
from workflow.guard import CheckedWorkflow, RefusedValue

from scripts.labels import LabelTable

from .abandoned import result_of
from .bundles import CLASSIFIER, Setup
from .errors import AppError, Conflict, Unusable
from .paths import renamed

__all__ = ["Prediction", "entropy", "label_table", "predict"]

logger = logging.getLogger(__name__)

_RUNS = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")


@dataclass(frozen=True)
class Prediction:
    """What the bundle says of a series.

    Attributes:
        probabilities: group -> class -> probability.
        any_injury: probability of any injury; None where the label table has none.
        evidence: what moved each decision, as the bundle's `evidence/000001.json`; None if it was not asked for.
        picture: the same as PNG.
    """

    probabilities: dict[str, dict[str, float]]
    any_injury: float | None
    evidence: dict[str, Any] | None
    picture: bytes | None


def label_table(setup: Setup) -> LabelTable:
    """The groups and classes of the classifier, the user's overrides included."""
    overrides = setup.overrides(CLASSIFIER, "inference")
    path = overrides.get("labels_file", setup.bundle(CLASSIFIER) / "configs" / "labels.json")
    return LabelTable.from_file(path, overrides.get("groups"))


def entropy(probabilities: Mapping[str, Mapping[str, float]]) -> float:
    """How uncertain a prediction is, 0 to 1: the mean over the groups of the entropy of their classes, each divided by
    its largest value, log(number of classes)."""
    parts = [
        sum(-p * math.log(p) for p in classes.values() if p > 0) / math.log(len(classes))
        for classes in probabilities.values()
    ]
    return sum(parts) / len(parts)


def predict(
    setup: Setup,
    image: Path,
    weights: Path,
    *,
    evidence: bool = False,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Prediction:
    """Run the bundle's inference on one series.

    Args:
        image: folder of a DICOM series, or NIfTI file.
        weights: of the version in use.
        evidence: also say, and draw, what moved the decision.
        options: further overrides for this run, such as `device` and `tta`.
        name: of the image in messages, which never hold a path of this machine.

    Raises:
        Unusable: the image is not exactly one CT series; the bundle's message.
        Conflict: the bundle refuses the weights or the settings, or the machine has no memory or disk left.
        AppError: the model failed.
        Abandoned: who asked for it has gone before its turn came.
    """
    return result_of(_RUNS, _predict, setup, image, weights, evidence, dict(options or {}), name or image.name)


def _predict(
    setup: Setup, image: Path, weights: Path, evidence: bool, options: dict[str, Any], name: str
) -> Prediction:
    bundle = setup.bundle(CLASSIFIER)
    with TemporaryDirectory(prefix="inference-") as folder, _random_state():
        names = {str(image): name, str(weights): weights.name, str(bundle): bundle.name, folder: "run"}
        device = {} if setup.device is None else {"device": setup.device}
        own = {"bundle_root": str(bundle), "dataset_dir": str(image), "weights": str(weights), "output_root": folder,
               "run_name": "run", "num_workers": 0, "evidence": evidence}  # fmt: skip
        overrides = {**device, **setup.overrides(CLASSIFIER, "inference"), **options, **own}
        try:
            _run(bundle / "configs" / "inference.json", overrides)
            return _read(Path(folder, "run"), label_table(setup))
        except (DatalistError, _FailedSeries) as error:
            raise Unusable(renamed(str(error), names)) from error
        except (RefusedValue, ValueError, FileNotFoundError) as error:
            raise Conflict(f"the model cannot be run: {renamed(str(error), names)}") from error
        except (MemoryError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise _no_fault_of_the_image(error, name) from error
        finally:
            gc.collect()  # an engine and its handlers refer to each other


def _no_fault_of_the_image(error: Exception, name: str) -> AppError:
    """What the machine could not do, in words; the log has all of it."""
    logger.error("inference of %s failed", name, exc_info=error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return Conflict(f"{name}: there is not enough memory for the model now: try again, or use another device")
    if isinstance(error, OSError):
        return Conflict(f"{name}: the server's disk or system refused: {error.strerror or type(error).__name__}")
    return AppError(f"{name}: the model failed with {type(error).__name__}; the server's log says why")


class _FailedSeries(Exception):
    """The bundle's reason why a series was left out."""


def _run(config_file: Path, overrides: Mapping[str, Any]) -> None:
    """The bundle's run, from `initialize` to `finalize`; errors without the layers that MONAI puts around them."""
    workflow = CheckedWorkflow(str(config_file), workflow_type="inference", logging_file=False, **overrides)
    run_folder = None
    try:
        workflow.initialize()
        parser = workflow.parser
        run_folder = parser.get_parsed_content("run_folder")
        number = len(parser.get_parsed_content("dataset"))
        if number != 1:
            raise _FailedSeries(f"expected one series, found {number} in {overrides['dataset_dir']}")
        workflow.run()
        failed = parser.get_parsed_content("writer").failed
        if failed:
            raise _FailedSeries(failed[0][1])
    except RuntimeError as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is error:
            raise
        raise cause from None
    finally:
        if run_folder is not None:  # its log file, whatever happened; `finalize` would end the process
            run_folder.finish()


def _read(run: Path, table: LabelTable) -> Prediction:
    """What a run has left of its only series."""
    content = json.loads((run / "series" / "000001.json").read_text(encoding="utf-8"))
    evidence, picture = run / "evidence" / "000001.json", run / "evidence" / "000001.png"
    return Prediction(
        probabilities=content["probabilities"],
        any_injury=None if table.any_injury is None else content[table.any_injury.name],
        evidence=json.loads(evidence.read_text(encoding="utf-8")) if evidence.is_file() else None,
        picture=picture.read_bytes() if picture.is_file() else None,
    )


@contextmanager
def _random_state() -> Iterator[None]:
    """A run seeds every generator of the process, and the next "random" image would be the same each time."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that the run seeds
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
