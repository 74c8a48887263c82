# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The MONAI Label app: serves the classifier of injuries, and trains it and its pretraining.

    python -m monailabel.main start_server --app apps/monailabel --studies STUDIES --host 127.0.0.1 \\
        --conf models rsna_cnn_lstm,voco2d_pretrain

MONAI Label imports this file in the server, and again in the process of each background task.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, TypeVar

import requests
from fastapi import FastAPI
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from lib.bundles import CLASSIFIER, PRETRAINING, SetupError, bundles_folder, left_aside, read_setup, use_bundle
from lib.refusal import refusing

with refusing(SetupError):  # the bundle's modules, which those of the app import
    use_bundle(bundles_folder(Path(__file__).parent, settings.MONAI_LABEL_APP_CONF) / CLASSIFIER)

from lib.dicomweb_store import DicomwebStore
from lib.errors import AppError, NotFound
from lib.infer_task import InjuryBatchInfer, InjuryInferTask
from lib.inference import entropy, label_table, predict
from lib.local_store import LocalStore
from lib.request_params import ORIGINAL
from lib.scoring import EntropyScoring
from lib.server import install
from lib.settings_check import check_settings
from lib.shutdown import end_tasks_with_the_server
from lib.store import SeriesStore
from lib.strategies import strategies
from lib.train_tasks import ClassifierTrainTask, PretrainTask
from lib.versions import ModelVersions

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
PACS = ("http://", "https://")  # what the address of one begins with


class InjuryApp(MONAILabelApp):
    """The classifier of injuries, its active learning and its training over one folder of studies or one PACS.

    Args:
        app_dir: folder of this app.
        studies: folder of CT series, or address of a DICOMweb server.
        conf: the `--conf` pairs, see `lib.bundles.Setup`.
    """

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        with refusing(SetupError):
            self.setup = read_setup(Path(app_dir), conf)
            check_settings(self.setup)
            if self.setup.patients is not None and studies.startswith(PACS):
                raise SetupError("--conf patients: is for a folder of studies; a PACS says itself who the patients are")
        self._inference_settings = self.setup.overrides(CLASSIFIER, "inference")
        self.table = label_table(self.setup)
        self.versions = ModelVersions(self.setup.output_root / CLASSIFIER / "versions", self.setup.weights)
        super().__init__(
            app_dir,
            studies,
            dict(conf),
            name="Abdominal trauma on CT",
            description="Classifies injuries, proposes what to label next and trains on the labels",
            labels=list(self.table.columns),
        )
        self._auto_update_scoring = self._auto_update_scoring and not self._is_pacs  # it would fetch the whole of it

    # the parts
    def init_datastore(self) -> SeriesStore:
        if self._is_pacs:
            return DicomwebStore(self.studies, self.table, labels=self.setup.labels)
        config = json.loads((self.setup.bundle(CLASSIFIER) / "configs" / "inference.json").read_text(encoding="utf-8"))
        exclude = self._inference_settings.get("exclude", config["exclude"])
        with refusing(SetupError):  # the file of the patients names images that are not there
            return LocalStore(Path(self.studies), self.table, exclude, self.setup.output_root,
                              labels=self.setup.labels, patients=self.setup.patients)  # fmt: skip

    def init_infers(self) -> dict[str, InjuryInferTask]:
        return {CLASSIFIER: InjuryInferTask(self.setup, self.versions)} if CLASSIFIER in self.setup.models else {}

    def init_trainers(self) -> dict[str, TrainTask]:
        tasks = {CLASSIFIER: ClassifierTrainTask, PRETRAINING: PretrainTask}
        return {name: tasks[name](self.setup, self.versions) for name in self.setup.models}

    def init_strategies(self) -> dict[str, Strategy]:
        return strategies(self.versions.current, self._inference_settings)

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        if CLASSIFIER not in self.setup.models:
            return {}
        predict_one = partial(predict, self.setup)
        return {"entropy": EntropyScoring(self.versions.current, predict_one, entropy, self._inference_settings)}

    def init_batch_infer(self) -> InjuryBatchInfer:
        return InjuryBatchInfer()

    def _load_sessions(self, load: bool = False) -> None:
        """None: see `lib.routes.CLOSED`."""

    def on_init_complete(self) -> None:
        """The server is there: give it its routes."""
        install(server_of_monailabel(), self)
        end_tasks_with_the_server()
        if self.setup.weights is None:
            logger.warning(left_aside(self.setup.bundles))
        if self._auto_update_scoring and self._has_weights():
            self.async_scoring(None)

    @property
    def _is_pacs(self) -> bool:
        return self.studies.startswith(PACS)

    def _has_weights(self) -> bool:
        try:
            return self.versions.current().weights.is_file()
        except AppError:
            return False

    # what the routes need
    @property
    def infers(self) -> Mapping[str, InjuryInferTask]:
        return self._infers

    @property
    def trainers(self) -> Mapping[str, TrainTask]:
        return self._trainers

    @property
    def strategies(self) -> Mapping[str, Strategy]:
        return self._strategies

    @property
    def scoring_methods(self) -> Mapping[str, ScoringMethod]:
        return self._scoring_methods

    def versions_of(self, model: str) -> ModelVersions:
        """Raises NotFound for a model that has none."""
        if model != CLASSIFIER or model not in self.setup.models:
            raise NotFound(f"no versions of a model {model[:80]!r}: expected {CLASSIFIER}")
        return self.versions

    def image_id(self, image: str) -> str:
        """The id of an image of the studies, given by its id or by its path; nothing else is one.

        The path is compared as text with those of the images: no file is looked at.

        Raises:
            NotFound: naming what was asked for.
        """
        path = os.path.abspath(os.path.join(self._datastore.images_root, image))
        for look in range(2):
            if look:  # it may have come since the last one
                self._datastore.refresh()
            items = self._datastore.items(patients=False)
            for item in items:
                if item["id"] == image or str(item["image"]) == path:
                    return item["id"]
        self._datastore.get_image_info(image)  # NotFound; or a PACS that may have it does not answer
        return image

    def folders(self) -> list[Path]:
        """The folders of this server, which no client needs to know."""
        setup, store = self.setup, self._datastore
        named = (setup.app_dir, setup.bundles, setup.output_root, store.root, store.images_root)
        files = (setup.weights, setup.patients)
        more = (setup.labels, *(file and file.parent for file in files), gettempdir(), sys.prefix)
        return [Path(folder) for folder in (*named, *more) if folder]

    # tasks
    def infer(self, request: Mapping[str, Any], datastore: SeriesStore | None = None) -> dict[str, Any]:
        """Predict an image of the studies by its id; `save_label` keeps the prediction as its label `original`."""
        store = self._datastore if datastore is None else datastore
        image = request["image"]
        result = self.infer_file(request, Path(store.get_image_uri(image)), image)
        if request.get("save_label"):
            info = {"model": request["model"], "version": result["params"]["version"]}
            with TemporaryDirectory(prefix="label-") as folder:
                file = Path(folder, "label.json")
                file.write_text(json.dumps(result["params"], indent=2, allow_nan=False), encoding="utf-8")
                result["label"] = store.save_label(image, str(file), ORIGINAL, info)
        return result

    def infer_file(self, request: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
        """Predict a series folder or NIfTI file; `name` stands for it in messages."""
        if request["model"] not in self.infers:
            raise NotFound(f"no model {request['model']!r}: expected {', '.join(self.infers)}")
        file, params = self.infers[request["model"]]({**request, "image": str(path), "image_id": name})
        return {"label": file, "tag": ORIGINAL, "params": params}

    def batch_infer(self, request: dict[str, Any], datastore: SeriesStore | None = None) -> dict[str, Any]:
        return self._as_task(lambda: super(InjuryApp, self).batch_infer(request, datastore))

    def scoring(self, request: dict[str, Any], datastore: SeriesStore | None = None) -> dict[str, Any]:
        return self._as_task(lambda: super(InjuryApp, self).scoring(request, datastore))

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._as_task(lambda: super(InjuryApp, self).train(request))

    def next_sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The next image to label; {} when there is none. Without its path, and without a download from the PACS."""
        return self._strategies[request["strategy"]](request, self._datastore) or {}

    def _as_task(self, run: Callable[[], Result]) -> Result:
        """Run a task; in a process of its own the last line that it leaves is our message, not a stack trace."""
        try:
            return run()
        except AppError as error:
            if self._server_mode:
                raise
            sys.stderr.write(f"error: {error.msg}\n")
            sys.stderr.flush()
            time.sleep(0.5)  # MONAI Label drops the lines that it has not read when the process ends
            raise SystemExit(1) from error

    def _local_request(self, url: str, params: Mapping[str, Any] | None, action: str) -> Any:
        """From the process of a task to the server; a training is not lost when it cannot be reached."""
        try:
            return super()._local_request(url, params, action)
        except (requests.RequestException, ValueError) as error:
            logger.warning("%s was not started: the server cannot be reached from here: %s", action, error)
            return None


def server_of_monailabel() -> FastAPI:
    """The running application: imported when it is there, as it is what imports this file."""
    from monailabel.app import app

    return app
