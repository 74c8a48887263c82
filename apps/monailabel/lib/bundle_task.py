# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training from MONAI Label: the classifier on the final labels, pretraining on every image.

```
output_root/
  rsna_cnn_lstm/
    folds.csv        which patients are held out: decided once each
    runs/NAME/       a training that is under way, or did not come to its end: kept, but for its checkpoints
    versions/0001/   one that did: see `lib.versions`
  voco2d_pretrain/
    runs/NAME/       of pretraining; complete with pretraining.json
  cache/             prepared volumes of all of them
```
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.train import TrainTask

from .bundle_run import RunFailed, alone, run_bundle
from .bundles import Setup
from .errors import Unusable
from .training_params import check_parameters, fixed_by_inference, open_parameters
from .versions import WEIGHTS, ModelVersions

__all__ = ["FOLDS", "TRAINING", "BundleTrainTask"]

logger = logging.getLogger(__name__)

TRAINING = WEIGHTS.split("/")[0]
FOLDS = "folds.csv"


class BundleTrainTask(TrainTask):
    """What the two have in common.

    Args:
        setup: of the app. versions: of the classifier.
    """

    model: str
    starts: tuple[str, ...]
    # over the bundle's defaults, below the settings file and the request
    defaults: Mapping[str, Any] = {}

    def __init__(self, setup: Setup, versions: ModelVersions, description: str) -> None:
        super().__init__(description)
        self.setup, self.versions = setup, versions
        self.bundle = setup.bundle(self.model)
        self.folder = setup.output_root / self.model
        self._train = json.loads((self.bundle / "configs" / "train.json").read_text(encoding="utf-8"))
        self._fixed: Collection[str] = fixed_by_inference(self.bundle)

    def config(self) -> dict[str, Any]:
        """What a request may set, with the value that holds without."""
        known = open_parameters(self._train, self._fixed)
        given = {**self.defaults, **self._settings()}
        return {"start": list(self.starts), **{name: given.get(name, value) for name, value in known.items()}}

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a request changes; the server may ask before it starts a process.

        Raises:
            Unusable: for unknown or unsuitable ones.
        """
        self._start(request)
        return check_parameters(request, self._train, self._fixed, own=("start",))

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        parameters = self.check(request)
        try:
            with alone(self.folder):
                self._remove_checkpoints()
                return self._run(self._start(request), parameters, datastore)
        except OSError as error:  # no room, or no permission
            logger.exception("files of the training")
            raise RunFailed(f"the training's files cannot be written or read: {error.strerror or error}") from error

    def _run(self, start: str, parameters: Mapping[str, Any], store: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _start(self, request: Mapping[str, Any]) -> str:
        start = request.get("start", self.starts[0])
        if start == list(self.starts):  # a client that sends `config` back as it came
            return self.starts[0]
        if start not in self.starts:
            raise Unusable(f"start: expected one of {', '.join(self.starts)}, got {str(start)[:60]!r}")
        return start

    def _settings(self) -> dict[str, Any]:
        device = {} if self.setup.device is None else {"device": self.setup.device}
        return {**device, **self.setup.overrides(self.model, "train")}

    def _new_run(self) -> Path:
        """A folder that no other run has, or had."""
        run = self.folder / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        run.mkdir(parents=True)
        return run

    def _overrides(self, parameters: Mapping[str, Any], run: Path, store: Any) -> dict[str, Any]:
        """The settings by which a run trains, the server's own last."""
        place = {"dataset_dir": str(store.images_root), "datalist": str(run / "datalist.json"), "resume": None}
        cache = {"cache_dir": str(self.setup.output_root / "cache")}
        return {**self.defaults, **cache, **self._settings(), **parameters, **place}

    def _bundle(self, configs: tuple[str, ...], overrides: Mapping[str, Any], run: Path, name: str, store: Any) -> Path:
        shipped = self.versions.shipped
        hide = [store.images_root, store.root, self.setup.output_root, *([shipped.parent] if shipped else [])]
        return run_bundle(self.bundle, configs, overrides, run, name, hide)

    def _remove_checkpoints(self) -> None:
        """Of runs that ended before their time: they are large, and nothing goes on with them."""
        for folder in (self.folder / "runs").glob(f"*/{TRAINING}/checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
