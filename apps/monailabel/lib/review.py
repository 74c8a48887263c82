# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The review page and what it reads: the studies, the volume as the classifier reads it, the picture of the evidence.

The page writes nothing here: predictions, labels, the next study and the versions are those of the REST interface
(`/infer`, `/datastore/label`, `/activelearning`, `/versions`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC

from .abandoned import while_asked
from .errors import NotFound, Unusable
from .strategies import noted_entropy, score_in_use
from .volumes import FileCache, VolumeReader

if TYPE_CHECKING:
    from .bundles import Setup
    from .inference import Prediction
    from .store import SeriesStore
    from .versions import ModelVersions

__all__ = ["MODEL", "PAGE", "build_router", "list_studies"]

MODEL = "rsna_cnn_lstm"
PAGE = Path(__file__).resolve().parents[1] / "review"
# the only files that are served, and as what
FILES = {
    "index.html": "text/html",
    "review.css": "text/css",
    "review.js": "text/javascript",
    "controls.js": "text/javascript",
    "label.js": "text/javascript",
    "panels.js": "text/javascript",
    "server.js": "text/javascript",
    "state.js": "text/javascript",
    "studies.js": "text/javascript",
    "versions.js": "text/javascript",
    "viewer.js": "text/javascript",
    "niivue.umd.js": "text/javascript",
    "niivue.LICENSE.txt": "text/plain",
}
WAITING = 4  # threads of each kind of file
VOLUMES, PICTURES = 8, 200  # kept on the disk: a volume of 512 x 512 x 500 takes 262 MB
# data: and blob: are what the viewer makes of its own fonts and what the page makes of the evidence's picture
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PRIVATE = {**HEADERS, "Cache-Control": "no-store"}  # patients' data stay in no cache of the browser
STATIC = {**HEADERS, "Cache-Control": "no-cache"}  # asked again each time: a new version of the app shows at once


def build_router(
    setup: Setup, store: SeriesStore, versions: ModelVersions, predict: Callable[..., Prediction]
) -> APIRouter:
    """The routes below `/review`.

    Args:
        setup: of the app; names the bundle, its settings and the folder for the caches.
        store: the studies and their labels.
        versions: of the classifier; the current one draws the evidence.
        predict: `inference.predict`.
    """
    router = APIRouter(prefix="/review", tags=["Review"])
    user = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
    reader = VolumeReader(setup.bundle(MODEL), setup.overrides(MODEL, "inference"))
    folder = Path(setup.output_root) / "review"
    volumes = FileCache(folder / "volumes", VOLUMES)
    pictures = FileCache(folder / "evidence", PICTURES)

    @router.get("/studies", dependencies=user, summary="Studies, the most uncertain first")
    def studies() -> JSONResponse:
        score_by = score_in_use(versions.current, setup.overrides(MODEL, "inference"))
        return JSONResponse(list_studies(store, score_by), headers=PRIVATE)

    @router.get("/labels", dependencies=user, summary="Groups and classes of labels, the healthy first")
    def labels() -> JSONResponse:
        groups = [
            {"name": group.name, "classes": [each.name for each in group.classes]} for group in store.table.groups
        ]
        return JSONResponse({"groups": groups, "window": reader.window}, headers=STATIC)

    def volume_file(image: str) -> Path:
        path = Path(store.get_image_uri(image))
        return volumes.get(reader.key(path, image), ".nii", lambda out: reader.write(path, image, out))

    def picture_file(image: str) -> Path:
        path, weights = Path(store.get_image_uri(image)), versions.current().weights

        def draw(file: IO[bytes]) -> None:
            picture = predict(setup, path, weights, evidence=True, name=image).picture
            if picture is None:
                raise NotFound(f"image {image!r}: the classifier gives no picture of its evidence.")
            file.write(picture)

        key = reader.key(path, image, str(weights), os.stat(weights).st_mtime_ns)
        return pictures.get(key, ".png", draw)

    # threads of their own: who waits for these keeps nobody else waiting
    readers, drawers = CapacityLimiter(WAITING), CapacityLimiter(WAITING)

    @router.get("/volume", dependencies=user, summary="The checked HU volume of a study as NIfTI")
    async def volume(request: Request, image: str) -> FileResponse:
        file = await while_asked(request, readers, volume_file, image)
        return FileResponse(file, media_type="application/octet-stream", headers=PRIVATE)

    @router.get("/evidence.png", dependencies=user, summary="What moved the classifier's decision, as a picture")
    async def evidence(request: Request, image: str) -> FileResponse:
        file = await while_asked(request, drawers, picture_file, image)
        return FileResponse(file, media_type="image/png", headers=PRIVATE)

    _add_page(router)
    return router


def _add_page(router: APIRouter) -> None:
    """The files of the page; after the other routes, which the names of files must not hide."""

    @router.get("/{name}", include_in_schema=False)
    def page(name: str) -> FileResponse:
        if name not in FILES:
            raise NotFound(f"the review page has no file {name!r}.")
        return FileResponse(PAGE / name, media_type=FILES[name], headers=STATIC)

    @router.get("/", summary="The review page")
    def index() -> FileResponse:
        return page("index.html")


def list_studies(store: SeriesStore, score_by: str | None = None) -> list[dict[str, Any]]:
    """What the page lists of each image: first those to review, the most uncertain first and those without a score
    after them; then those with a label; last those that cannot be read. Equals are in the order of their ids."""
    return sorted((_study(store, image, score_by) for image in store.list_images()), key=_order)


def _study(store: SeriesStore, image: str, score_by: str | None) -> dict[str, Any]:
    """Anybody may note anything of an image through the interface, and put a file among the labels."""
    info = store.get_image_info(image)
    try:
        label, wrong = store.label(image), None
    except Unusable as error:
        label, wrong = None, error.msg
    return {
        "id": image,
        "patient_id": info["patient_id"],
        "label": label,
        "label_error": wrong,
        "entropy": noted_entropy(info, score_by),
        "failed": str(info["failed"]) if info.get("failed") else None,
    }


def _order(study: Mapping[str, Any]) -> tuple[int, float, str]:
    rank = 2 if study["failed"] else 1 if study["label"] else 0
    return rank, 1.0 if study["entropy"] is None else -study["entropy"], study["id"]
