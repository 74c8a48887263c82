# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The REST interface: MONAI Label's, with its paths, parameters and replies, as far as a classifier needs it.

Long work runs in threads, so that the event loop stays free. MONAI Label's functions do the work where they are safe as
they are; names and parameters are checked before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, HTTPException, Request, UploadFile
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, login, scoring, train
from monailabel.endpoints import model as model_files
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType

from .abandoned import while_asked
from .errors import NotFound, Unusable
from .limits import FORM
from .request_params import JsonBody, JsonField, inference_params, json_object, task_params
from .store_routes import add_store_routes
from .task_state import task_state
from .uploads import unpack_upload

if TYPE_CHECKING:
    from main import InjuryApp

__all__ = ["CLOSED", "build_routes"]

USER = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
ANNOTATOR = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
ADMIN = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]
# MONAI Label's routes that are closed, and why
CLOSED = {
    "/infer/wsi/{rest:path}": "takes any path of this machine as an image, and is for pathology",
    "/infer/wsi_v2/{rest:path}": "takes any path of this machine as an image, and is for pathology",
    "/session/{rest:path}": "unpacks uploads without a limit; send the file to /infer",
    "/proxy/{rest:path}": "hands any request on to the PACS, with the password of this server",
    "/ohif/{rest:path}": "shows nothing for a classifier; the page for it is /review/",
    "/logs/{rest:path}": "holds stack traces and paths; they are in logs/ of the app's folder",
    "/reload": "builds the app anew while it is in use; restart the server",
    "/docs": "loads scripts from the network; /openapi.json describes the interface",
    "/datastore/dataset": "writes a copy of all labelled images to this machine's disk; labels are in the studies",
    "/datastore/updatelabelinfo": "is an old name of /datastore/label/info",
}
# weights are pickles: an uploaded one could run code here; /versions/ is the way to change them
READ_ONLY = {"/model/{model}": "weights come from trainings alone; /versions/ tells and chooses them"}
WAITING = 8  # threads of requests for inference, apart from those of all other requests


def build_routes(app: InjuryApp) -> APIRouter:
    """All but the review page."""
    router = APIRouter(form_limits=FORM)
    if settings.MONAI_LABEL_AUTH_ENABLE:
        router.include_router(login.router)

    @router.get("/info/", dependencies=USER, tags=["App"])
    def info() -> dict[str, Any]:
        return app.info()

    _close(router, CLOSED, ["GET", "POST", "PUT", "DELETE", "HEAD"])
    _close(router, READ_ONLY, ["PUT", "DELETE"])
    _add_inference(router, app)
    _add_starts(router, app)
    for path, task, role in (("/train/", train, ADMIN), ("/scoring/", scoring, ANNOTATOR)):
        _add_state(router, app, path, task, role)
    _add_state(router, app, "/batch/infer", batch_infer, ADMIN)
    _add_models(router, app)
    add_store_routes(router, app, USER, ANNOTATOR, ADMIN)
    return router


def _add_inference(router: APIRouter, app: InjuryApp) -> None:
    threads = CapacityLimiter(WAITING)

    @router.post("/infer/{model}", dependencies=USER, tags=["Infer"])
    async def infer(
        asked: Request,
        model: str,
        image: str = "",
        session_id: str = "",
        output: str = "json",
        params: JsonField = "{}",
        file: UploadFile | None = None,
    ) -> dict[str, Any]:
        """Probabilities of an image of the studies (its id), or of an upload: NIfTI, or a zip of one DICOM series."""
        _known(model, app.infers, "model")
        if output not in ("json", "all"):
            raise Unusable(f"output: expected json: a classifier makes no image, got {output[:40]!r}")
        if session_id:
            raise Unusable("session_id: sessions are closed here: give image, or file")
        if bool(image) == (file is not None):
            raise Unusable("expected either image, the id of one of the studies, or file, an upload")
        request = {"model": model, **inference_params(json_object(params, "params"))}
        return await while_asked(asked, threads, _infer, app, request, image, file)

    @router.post("/batch/infer/{model}", dependencies=ADMIN, tags=["Infer"])
    def batch(
        model: str,
        images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
        params: JsonBody = None,
        run_sync: bool = False,
    ) -> Any:
        """Predict all images, the labelled or the unlabelled ones, and keep the predictions as labels `original`."""
        _known(model, app.infers, "model")
        params = task_params(params)
        number = params.get("max_batch_size") or 0
        if not isinstance(number, int) or number < 0:
            raise Unusable(f"max_batch_size: expected a number, 0 for all, got {str(number)[:40]!r}")
        request = {**inference_params(params), "max_batch_size": number}
        return _shown(batch_infer.run(model, images.value, request, run_sync), run_sync)


def _infer(app: InjuryApp, request: Mapping[str, Any], image: str, file: UploadFile | None) -> dict[str, Any]:
    if file is None:
        image_id = app.image_id(image)
        result = app.infer({**request, "image": image_id})
        named = {"image": image_id, **({"label": result["label"]} if request.get("save_label") else {})}
    else:
        named = {}
        with TemporaryDirectory(prefix="upload-") as folder:
            path = unpack_upload(file.file, Path(folder), app.setup.unpacked_limit)
            result = app.infer_file(request, path, "upload")
    return {**result["params"], **named}


def _add_starts(router: APIRouter, app: InjuryApp) -> None:
    @router.post("/activelearning/{strategy}", dependencies=USER, tags=["ActiveLearning"])
    def sample(strategy: str, params: JsonBody = None) -> dict[str, Any]:
        _known(strategy, app.strategies, "strategy")
        return activelearning.sample(strategy, task_params(params), None)

    @router.post("/scoring/{method}", dependencies=ANNOTATOR, tags=["Scoring"])
    def score(method: str, params: JsonBody = None, run_sync: bool = False) -> Any:
        _known(method, app.scoring_methods, "scoring method")
        request = task_params(params)
        app.scoring_methods[method].check(request)
        return _shown(scoring.run_method(method, request, run_sync), run_sync)

    @router.post("/train/{model}", dependencies=ADMIN, tags=["Train"])
    def start_training(model: str, params: JsonBody = None, run_sync: bool = False, enqueue: bool = False) -> Any:
        _known(model, app.trainers, "model to train")
        request = task_params(params)
        app.trainers[model].check(request)
        return _shown(train.run_model(model, request, run_sync, enqueue), run_sync)


def _add_state(router: APIRouter, app: InjuryApp, path: str, task: ModuleType, role: list[Any]) -> None:
    """State and end of a background task."""
    folders = app.folders()

    @router.get(path, dependencies=USER)
    def state(all: bool = False, check_if_running: bool = False) -> Any:
        found = task.status(all, check_if_running)
        return [task_state(each, folders) for each in found] if isinstance(found, list) else task_state(found, folders)

    @router.delete(path, dependencies=role)
    def stop() -> Any:
        return task_state(task.stop(), folders)


def _add_models(router: APIRouter, app: InjuryApp) -> None:
    @router.get("/versions/{model}", dependencies=USER, tags=["Model"])
    def versions(model: str) -> list[dict[str, Any]]:
        """The versions of a model, the one in use marked."""
        return app.versions_of(model).list()

    @router.put("/versions/{model}", dependencies=ADMIN, tags=["Model"])
    def choose(model: str, version: str) -> dict[str, Any]:
        """Use a version from now on, an earlier one too."""
        return {"model": model, "version": app.versions_of(model).choose(version).name}

    @router.get("/model/{model}", dependencies=ADMIN, tags=["Model"])
    def weights(model: str) -> Any:
        _known(model, app.infers, "model")
        return model_files.download_model(model)

    @router.get("/model/info/{model}", dependencies=ADMIN, tags=["Model"])
    def weights_info(model: str) -> Any:
        _known(model, app.infers, "model")
        return model_files.model_info(model)


def _close(router: APIRouter, paths: Mapping[str, str], methods: list[str]) -> None:
    for path, reason in paths.items():

        def closed(reason: str = reason) -> None:
            raise HTTPException(403, f"closed in this app: {reason}")

        router.add_api_route(path, lambda closed=closed: closed(), methods=methods, include_in_schema=False)


def _known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        raise NotFound(f"no {what} {name[:80]!r}: expected {', '.join(known) or 'none, this server has none'}")


def _shown(result: Any, run_sync: bool) -> Any:
    """A task that was started, or the result of one that was waited for. The task may be running before the reply is
    written: a start says the same each time."""
    return result if run_sync else {**(task_state(result) or {}), "status": "SUBMITTED"}
