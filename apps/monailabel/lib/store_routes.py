# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The REST interface of the studies and their labels. Every id and tag is checked by the store, which makes no path of
one that it does not know."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, UploadFile
from monailabel.endpoints import datastore as stock
from monailabel.utils.others.generic import get_mime_type
from starlette.responses import FileResponse

from .errors import NotFound, Unusable
from .request_params import JsonField, json_object
from .strategies import SCORE

if TYPE_CHECKING:
    from main import InjuryApp

__all__ = ["add_store_routes"]

FINAL = "final"
# notes that the server makes and its strategies read
NOTES = {*SCORE, "failed", "strategy"}


def add_store_routes(
    router: APIRouter, app: InjuryApp, user: list[Any], annotator: list[Any], admin: list[Any]
) -> None:
    """Routes below `/datastore`, with the dependencies that hold for each role."""
    datastore = APIRouter(prefix="/datastore", tags=["Datastore"])

    store = app.datastore()

    @datastore.get("/", dependencies=user)
    def studies(output: stock.ResultType | None = None) -> Any:
        """Counts, or all that is known of the images, or those to train with: ids, no paths of this machine."""
        if output == stock.ResultType.train:
            return [{"image": image, "label": image, "tag": FINAL} for image in store.get_labeled_images()]
        return store.json() if output == stock.ResultType.all else store.status()

    _add_images(datastore, app, user, annotator, admin)
    _add_labels(datastore, app, user, annotator, admin)
    router.include_router(datastore)


def _add_images(router: APIRouter, app: InjuryApp, user: list[Any], annotator: list[Any], admin: list[Any]) -> None:
    store = app.datastore()

    @router.put("/image", dependencies=annotator)
    def add_image(file: UploadFile, image: str = "", params: JsonField = "{}") -> dict[str, str]:
        """Add a NIfTI file to a folder of studies."""
        name = Path(file.filename or "").name
        with TemporaryDirectory(prefix="upload-") as folder:
            path = Path(folder, f"image{''.join(Path(name).suffixes[-2:])}")
            _save(file, path)
            return {"image": store.add_image(image or name, str(path), _image_info(params))}

    @router.delete("/image", dependencies=admin)
    def remove_image(id: str) -> dict[str, Any]:
        store.remove_image(id)
        return {}

    @router.get("/image", dependencies=user, response_class=FileResponse)
    def image_file(image: str) -> FileResponse:
        path = store.get_image_uri(image)
        if not Path(path).is_file():
            raise NotFound(f"image {image} is a DICOM series, no single file")
        return FileResponse(path, media_type=get_mime_type(path), filename=Path(path).name)

    @router.head("/image", dependencies=user)
    def has_image(image: str) -> None:
        if not Path(store.get_image_uri(image)).is_file():
            raise NotFound(f"image {image} is a DICOM series, no single file")

    @router.get("/image/info", dependencies=user)
    def image_info(image: str) -> dict[str, Any]:
        return store.get_image_info(image)

    @router.put("/image/info", dependencies=annotator)
    def note(image: str, info: JsonField = "{}") -> None:
        store.update_image_info(image, _image_info(info))


def _add_labels(router: APIRouter, app: InjuryApp, user: list[Any], annotator: list[Any], admin: list[Any]) -> None:
    store = app.datastore()

    @router.put("/label", dependencies=annotator)
    def save_label(image: str, label: UploadFile, tag: str = FINAL, params: JsonField = "{}") -> dict[str, Any]:
        """Store the label of an image: a JSON file, `{"groups": {"spleen": "high", ...}}`."""
        info = json_object(params, "params")
        with TemporaryDirectory(prefix="label-") as folder:
            path = Path(folder, "label.json")
            _save(label, path)
            label_id = store.save_label(image, str(path), tag or FINAL, info)
        app.on_save_label(image, label_id)
        return {"image": image, "label": label_id}

    @router.delete("/label", dependencies=admin)
    def remove_label(id: str, tag: str) -> dict[str, Any]:
        store.remove_label(id, tag)
        return {}

    @router.get("/label", dependencies=user, response_class=FileResponse)
    def label_file(label: str, tag: str) -> FileResponse:
        return FileResponse(store.get_label_uri(label, tag), media_type="application/json")

    @router.head("/label", dependencies=user)
    def has_label(image: str, tag: str) -> None:
        store.get_label_uri(image, tag)

    @router.get("/label/info", dependencies=user)
    def label_info(label: str, tag: str) -> dict[str, Any]:
        return store.get_label_info(label, tag)

    @router.put("/label/info", dependencies=annotator)
    def update_label_info(label: str, tag: str, info: JsonField = "{}") -> None:
        store.update_label_info(label, tag, json_object(info, "info"))


def _image_info(text: str) -> dict[str, Any]:
    info = json_object(text, "info")
    own = sorted(NOTES & set(info))
    if own:
        raise Unusable(f"info: {', '.join(own)} is noted by the server itself")
    return info


def _save(upload: UploadFile, path: Path) -> None:
    """Write an upload; how long it may be, `lib.limits` says."""
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target)
