# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the review page reads: the list in its order, volumes as the bundle reads them, the picture, its own files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from transforms.series import LoadSeries

from apps.monailabel.lib.errors import AppError, Unusable
from apps.monailabel.lib.local_store import LocalStore
from apps.monailabel.lib.review import FILES, PAGE, build_router
from apps.monailabel.lib.strategies import score_of
from apps.monailabel.lib.volumes import FileCache
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
TABLE = LabelTable.from_file(BUNDLE / "configs" / "labels.json")
SERIES, VOLUME, BROKEN = "case 7/venous", "lidc.nii.gz", "broken.nii.gz"
LABEL = {"groups": {"spleen": "high"}, "reader": "A. B."}


@dataclass
class Page:
    """A server that has nothing but the router; `calls` of the classifier are counted."""

    store: LocalStore
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    picture: bytes | None = b"a picture"
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.folder / "model.pt"
        self.weights.write_bytes(b"weights")
        self.setup = SimpleNamespace(
            bundle=lambda _name: BUNDLE, overrides=lambda _name, _config: self.settings, output_root=self.folder
        )
        self.versions = SimpleNamespace(current=lambda: SimpleNamespace(name="shipped", weights=self.weights))
        app = FastAPI()
        app.include_router(build_router(self.setup, self.store, self.versions, self.predict))
        app.add_exception_handler(AppError, lambda _request, error: JSONResponse({"detail": error.msg}, error.status))
        self.client = TestClient(app)

    def predict(self, _setup: object, image: Path, weights: Path, **options: object) -> SimpleNamespace:
        self.calls.append({"image": image, "weights": weights, **options})
        if image.name == BROKEN:
            raise Unusable(f"{options['name']}: no series")
        return SimpleNamespace(picture=self.picture)

    def get(self, path: str, **query: str) -> Any:
        return self.client.get(f"/review/{path}", params=query)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Page]:
    def make(**settings: Any) -> Page:
        studies = tmp_path / "studies"
        shutil.copytree(DATA / "crlm_ct_1004", studies / SERIES)
        shutil.copy(DATA / "lidc_idri_0001.nii.gz", studies / VOLUME)
        (studies / BROKEN).write_bytes(b"no volume")
        (tmp_path / "secret.nii.gz").write_bytes((studies / VOLUME).read_bytes())
        exclude = json.loads((BUNDLE / "configs" / "inference.json").read_text())["exclude"]
        return Page(LocalStore(studies, TABLE, exclude), tmp_path, settings)

    return make


def save(page: Page, image: str, label: dict[str, Any]) -> None:
    path = page.folder / "label.json"
    path.write_text(json.dumps(label))
    page.store.save_label(image, str(path), "final", {})


def volume_of(page: Page, image: str) -> nib.Nifti1Image:
    reply = page.get("volume", image=image)
    assert reply.status_code == 200
    return nib.Nifti1Image.from_bytes(reply.content)


def test_studies_are_listed_by_what_is_to_be_reviewed_next(start):
    page = start()
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        (page.store.root / name).write_bytes(b"a volume")
    page.store.refresh()
    by = {"entropy_by": score_of(page.versions.current(), page.setup.overrides("rsna_cnn_lstm", "inference"))}
    for image, notes in {VOLUME: {"entropy": 0.9, **by}, SERIES: {"entropy": 0.2, **by},
                         "a.nii.gz": {"entropy": 0.95, "entropy_by": "a version before"},
                         "c.nii.gz": {"entropy": 0.99, **by}, BROKEN: {"failed": "no series"}}.items():  # fmt: skip
        page.store.update_image_info(image, notes)
    save(page, "c.nii.gz", LABEL)
    listed = page.get("studies").json()
    assert [study["id"] for study in listed] == [VOLUME, SERIES, "a.nii.gz", "b.nii.gz", "c.nii.gz", BROKEN]
    first, unscored, labelled, broken = listed[0], listed[2], listed[4], listed[5]
    assert unscored["entropy"] is None
    assert (first["entropy"], first["label"], first["failed"], first["patient_id"]) == (0.9, None, None, VOLUME)
    assert labelled["label"] == LABEL
    assert broken["failed"] == "no series"


@pytest.mark.parametrize("entropy", ["high", None, True, [1], {}])
def test_notes_that_are_no_score_do_not_break_the_list(start, entropy):
    page = start()
    page.store.update_image_info(VOLUME, {"entropy": entropy, "failed": ["what", 1]})
    page.store.update_image_info(SERIES, {"entropy": entropy})
    study = next(study for study in page.get("studies").json() if study["id"] == SERIES)
    assert study["entropy"] is None


def test_a_label_that_is_none_is_listed_with_the_reason(start):
    page = start()
    save(page, VOLUME, LABEL)
    Path(page.store.get_label_uri(VOLUME, "final")).write_text('{"groups": {"brain": "healthy"}}')
    study = next(study for study in page.get("studies").json() if study["id"] == VOLUME)
    assert study["label"] is None
    assert "brain" in study["label_error"]


def test_labels_are_those_of_the_bundle(start):
    reply = start().get("labels").json()
    assert {group["name"]: group["classes"] for group in reply["groups"]} == {
        group.name: [each.name for each in group.classes] for group in TABLE.groups
    }
    assert reply["window"] == [-175, 250]


@pytest.mark.parametrize("image", [SERIES, VOLUME])
def test_volume_is_what_the_bundle_reads(start, image):
    page = start()
    shown, read = volume_of(page, image), LoadSeries()(page.store.path(image))
    assert shown.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(shown.dataobj), read[0].numpy())
    np.testing.assert_allclose(shown.affine, read.affine.numpy(), atol=1e-4)
    assert nib.aff2axcodes(shown.affine) == ("R", "A", "S")
    assert [int(shown.header[code]) for code in ("sform_code", "qform_code")] == [1, 1]
    np.testing.assert_allclose(shown.get_qform(), shown.affine, atol=1e-3)


def test_volume_is_read_once_and_again_when_its_files_change(start, monkeypatch):
    page = start()
    reads = []
    load = LoadSeries.__call__
    monkeypatch.setattr(LoadSeries, "__call__", lambda self, path: reads.append(path) or load(self, path))
    for _ in range(3):
        volume_of(page, VOLUME)
    assert len(reads) == 1
    shutil.copy(DATA / "cptac_pda_c3l_00189.nii.gz", page.store.path(VOLUME))
    assert volume_of(page, VOLUME).shape == (128, 128, 35)
    assert len(reads) == 2


@pytest.mark.parametrize("window", [None, [-175, 250]])
def test_volume_is_read_with_the_settings_of_the_app(start, window):
    page = start(eight_bit_window=window)
    eight_bit = nib.Nifti1Image(np.full((16, 16, 8), 51, np.uint8), np.diag([3.0, 3.0, 5.0, 1.0]))
    eight_bit.to_filename(page.store.path(VOLUME))
    if window is None:
        assert page.get("volume", image=VOLUME).status_code == 422
    else:
        np.testing.assert_allclose(np.asarray(volume_of(page, VOLUME).dataobj), -175 + 51 / 255 * 425, atol=0.5)


@pytest.mark.parametrize("route", ["volume", "evidence.png"])
@pytest.mark.parametrize("image", ["nothing.nii.gz", "../secret.nii.gz", "/etc/passwd", "", "case 7", "."])
def test_only_images_of_the_studies_are_read(start, route, image):
    page = start()
    for name in (image, str(page.folder / "secret.nii.gz"), str(page.store.path(VOLUME))):
        reply = page.get(route, image=name)
        assert reply.status_code == 404
        assert str(page.folder) not in reply.json()["detail"] or name in reply.json()["detail"]
    assert page.calls == []


@pytest.mark.parametrize("route", ["volume", "evidence.png"])
def test_series_that_cannot_be_read_is_named_and_its_path_is_not(start, route):
    page = start()
    reply = page.get(route, image=BROKEN)
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith(BROKEN)
    assert str(page.folder) not in reply.text
    assert list(page.folder.glob("review/*/*")) == []


def test_picture_is_that_of_the_version_in_use_and_drawn_once(start):
    page = start()
    for _ in range(2):
        reply = page.get("evidence.png", image=SERIES)
        assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b"a picture", "image/png")
    assert page.calls == [{"image": page.store.path(SERIES), "weights": page.weights, "evidence": True, "name": SERIES}]
    page.weights = page.folder / "other.pt"
    page.weights.write_bytes(b"other weights")
    page.picture = b"another picture"
    assert page.get("evidence.png", image=SERIES).content == b"another picture"


def test_who_waits_for_pictures_keeps_nobody_else_waiting(start):
    """45 are more than the threads that all other routes share."""
    page, free = start(), threading.Event()

    def predict(*_: object, **__: object) -> SimpleNamespace:
        free.wait(30)
        return SimpleNamespace(picture=b"a picture")

    app = FastAPI()
    app.include_router(build_router(page.setup, page.store, page.versions, predict))
    with TestClient(app) as client, ThreadPoolExecutor(50) as clients:
        try:
            asked = [clients.submit(client.get, "/review/evidence.png", params={"image": VOLUME}) for _ in range(45)]
            time.sleep(1)
            assert clients.submit(client.get, "/review/studies").result(10).status_code == 200
            assert clients.submit(client.get, "/review/volume", params={"image": VOLUME}).result(20).status_code == 200
            assert not any(request.done() for request in asked)
        finally:
            free.set()
        assert all(request.result().content == b"a picture" for request in asked)


def test_without_a_picture_there_is_a_clear_reply(start):
    page = start()
    page.picture = None
    reply = page.get("evidence.png", image=SERIES)
    assert reply.status_code == 404
    assert SERIES in reply.json()["detail"]


def test_page_and_its_files_come_with_a_policy_that_lets_nothing_else_in(start):
    page = start()
    for name in ("", *FILES):
        reply = page.get(name)
        assert reply.status_code == 200
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert not re.search(r"unsafe|http|\*", reply.headers["content-security-policy"])
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.content == (PAGE / (name or "index.html")).read_bytes()


def test_data_of_patients_stay_in_no_cache_of_the_browser(start):
    page = start()
    for route in ("studies", "volume", "evidence.png"):
        assert page.get(route, image=VOLUME).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["README.md", "..%2flib%2freview.py", "%2e%2e/lib/review.py", "nothing.js", "niivue"])
def test_no_other_file_is_served(start, name):
    assert start().get(name).status_code == 404


def test_page_has_no_inline_script_or_style_and_names_no_other_address():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=\")|<style|\son\w+=|\sstyle=|https?:", page)
    for name in FILES:
        if name.endswith(".js") and name != "niivue.umd.js":
            text = (PAGE / name).read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?:", text)


def test_viewer_is_the_file_that_the_notes_name():
    notes = (PAGE / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((PAGE / "niivue.umd.js").read_bytes()).hexdigest() in notes
    assert "Copyright (c) 2021, Niivue" in (PAGE / "niivue.LICENSE.txt").read_text(encoding="utf-8")


def test_cache_keeps_its_bound_and_what_was_asked_for_last(tmp_path):
    cache = FileCache(tmp_path / "cache", 3)
    for number, key in enumerate("abcabd"):
        made = cache.get(key, ".bin", lambda file, key=key: file.write(key.encode()))
        assert made.read_bytes() == key.encode()
        os.utime(made, (number, number))
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a.bin", "b.bin", "d.bin"]


def test_cache_keeps_nothing_of_a_file_that_could_not_be_made(tmp_path):
    cache = FileCache(tmp_path / "cache", 3)

    def fail(file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise Unusable("no series")

    with pytest.raises(Unusable, match="no series"):
        cache.get("a", ".bin", fail)
    assert list(cache.folder.iterdir()) == []
