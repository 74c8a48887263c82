# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Series of a DICOMweb server: whole or not at all. First a server that misbehaves, then Orthanc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from pydicom.dataset import Dataset

from apps.monailabel.lib.dicomweb_store import DicomwebStore, Unreachable
from apps.monailabel.lib.errors import Conflict, NotFound
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

ROOT = Path(__file__).resolve().parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles" / "rsna_cnn_lstm" / "configs" / "labels.json")
SERIES = ROOT / "tests" / "data" / "crlm_ct_1004"
STUDY_UID, SERIES_UID = "1.2.3", "1.3.6.1.4.1.14519.5.2.1.9203.8273.254242588659825836950462054011"


def answer(**elements: str) -> dict[str, Any]:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset.to_json_dict()


class FakeClient:
    """Answers as a DICOMweb server that has the real series, `page` answers at a time."""

    def __init__(self, page: int = 1000) -> None:
        self.page = page
        self.series = [answer(SeriesInstanceUID=SERIES_UID, StudyInstanceUID=STUDY_UID, PatientID="p 7")]
        self.images = [pydicom.dcmread(path) for path in sorted(SERIES.iterdir())]
        self.fault: Callable[[], None] | None = None
        self.downloads = 0

    def search_for_series(self, *, search_filters: dict, fields: list[str], offset: int) -> list[dict[str, Any]]:
        assert search_filters == {"Modality": "CT"}
        return self.series[offset : offset + self.page]

    def search_for_instances(self, study: str, series: str, *, offset: int) -> list[dict[str, Any]]:
        assert (study, series) == (STUDY_UID, SERIES_UID)
        found = [answer(SOPInstanceUID=image.SOPInstanceUID, SeriesInstanceUID=series) for image in self.images]
        return found[offset : offset + self.page]

    def iter_series(self, study: str, series: str, *, media_types: tuple) -> Iterator[Dataset]:
        self.downloads += 1
        yield from self.images[:5]
        if self.fault is not None:
            self.fault()
        yield from self.images[5:]


@pytest.fixture
def store(tmp_path: Path) -> DicomwebStore:
    store = DicomwebStore("http://127.0.0.1:9/dicom-web", TABLE, tmp_path)
    store._client = FakeClient()
    return store


def kept(store: DicomwebStore) -> list[str]:
    """What is in the cache but for locks."""
    return sorted(path.name for path in store.images_root.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_a_series_is_kept_as_it_was_sent(store: DicomwebStore, page: int) -> None:
    store._client = FakeClient(page)
    assert store.items() == [{"id": SERIES_UID, "image": str(store.images_root / SERIES_UID), "study_id": STUDY_UID,
                              "patient_id": "p 7", "series_id": SERIES_UID}]  # fmt: skip
    assert not store.images_root.exists(), "nothing is downloaded before somebody asks for it"
    folder = Path(store.get_image_uri(SERIES_UID))
    assert kept(store) == [SERIES_UID]
    sent = sorted(path.read_bytes() for path in SERIES.iterdir())
    assert sorted(path.read_bytes() for path in folder.iterdir()) == sent
    assert store.path(SERIES_UID) == folder
    assert store._client.downloads == 1


def test_all_pages_of_the_list_are_read_and_names_that_are_no_uids_are_passed_over(store: DicomwebStore) -> None:
    store._client = FakeClient(page=2)
    uids = [f"1.2.{number}" for number in range(5)] + ["../../evil", "..", "1/2", ""]
    store._client.series = [answer(SeriesInstanceUID=uid, StudyInstanceUID=STUDY_UID) for uid in uids]
    assert store.list_images() == uids[:5]
    assert store.items()[0]["patient_id"] == STUDY_UID, "a series without a patient is one with its study"
    store._client.search_for_series = lambda **_: store._client.series  # ignores the offset
    store.refresh()
    assert store.list_images() == uids[:5]


def break_off() -> None:
    raise requests.ConnectionError("broken")


def no_dicom() -> None:
    raise pydicom.errors.InvalidDicomError("not DICOM")


def too_late() -> None:
    raise requests.Timeout("late")


@pytest.mark.parametrize(
    ("fault", "message"),
    [(break_off, "cannot be reached, or broke off"), (no_dicom, "sent what is no DICOM"), (too_late, "in time")],
)
def test_half_a_series_is_not_kept(store: DicomwebStore, fault: Callable[[], None], message: str) -> None:
    store._client.fault = fault
    with pytest.raises(Unreachable, match=message) as caught:
        store.path(SERIES_UID)
    assert caught.value.status == 502
    assert kept(store) == []
    store._client.fault = None
    assert len(list(store.path(SERIES_UID).iterdir())) == 8


def test_a_series_that_ends_early_is_not_kept(store: DicomwebStore) -> None:
    whole = store._client.iter_series
    store._client.iter_series = lambda *args, **kwargs: list(whole(*args, **kwargs))[:5]
    with pytest.raises(Unreachable, match="sent 5 of the 8 images of series"):
        store.path(SERIES_UID)
    assert kept(store) == []


def test_images_of_another_series_are_refused(store: DicomwebStore) -> None:
    store._client.images[6].SeriesInstanceUID = "1.2.3.4"
    with pytest.raises(Unreachable, match="of another series"):
        store.path(SERIES_UID)
    store._client = FakeClient()
    store._client.images[6].SOPInstanceUID = "../../evil"
    with pytest.raises(Unreachable, match=r"image '\.\./\.\./evil'"):
        store.path(SERIES_UID)
    assert kept(store) == []


def test_what_a_killed_process_left_is_cleared(store: DicomwebStore) -> None:
    part = store.images_root / f".{SERIES_UID}.part"
    part.mkdir(parents=True)
    shutil.copy(SERIES / "1-18.dcm", part / "other.dcm")
    assert len(list(store.path(SERIES_UID).iterdir())) == 8
    assert kept(store) == [SERIES_UID]


def test_several_that_ask_at_once_share_one_download(store: DicomwebStore) -> None:
    threads = [threading.Thread(target=store.path, args=(SERIES_UID,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert store._client.downloads == 1


def test_images_stay_with_the_server(store: DicomwebStore, tmp_path: Path) -> None:
    for image in ("1.2.3", "../x", ""):
        with pytest.raises(NotFound, match="there is no image"):
            store.path(image)
    with pytest.raises(Conflict, match="send the series to the DICOMweb server"):
        store.add_image("x", str(tmp_path / "x.nii.gz"), {})
    with pytest.raises(Conflict, match="never deletes images"):
        store.remove_image(SERIES_UID)


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    store = DicomwebStore("http://127.0.0.1:9/dicom-web", TABLE, tmp_path)
    with pytest.raises(Unreachable, match="asked for its series and cannot be reached"):
        store.status()


@pytest.mark.debian
@pytest.mark.slow
def test_orthanc() -> None:
    """`dicomweb_session.py` in a network of its own: Orthanc listens on every address."""
    assert shutil.which("Orthanc", path="/usr/sbin:/usr/bin"), "needs the Debian packages orthanc and orthanc-dicomweb"
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    session = Path(__file__).with_name("dicomweb_session.py")
    command = [*unshare, sys.executable, "-m", "pytest", str(session), "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
