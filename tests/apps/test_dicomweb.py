# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Series of a DICOMweb server: whole or not at all. First a server that misbehaves, then Orthanc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from monailabel.config import settings
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
        self.says_how_many = True
        self.down = False
        self.searches = self.downloads = 0

    def search_for_series(self, *, search_filters: dict, fields: list[str], offset: int) -> list[dict[str, Any]]:
        assert search_filters == {"Modality": "CT"}
        self.searches += 1
        if self.down:
            break_off()
        if "NumberOfSeriesRelatedInstances" in fields and self.says_how_many and len(self.series) == 1:
            number = answer(NumberOfSeriesRelatedInstances=str(len(self.images)))
            return [{**each, **number} for each in self.series[offset : offset + self.page]]
        return self.series[offset : offset + self.page]

    def search_for_instances(self, study: str, series: str, *, offset: int) -> list[dict[str, Any]]:
        assert (study, series) == (STUDY_UID, SERIES_UID)
        if self.down:
            break_off()
        found = [answer(SOPInstanceUID=image.SOPInstanceUID, SeriesInstanceUID=series) for image in self.images]
        return found[offset : offset + self.page]

    def iter_series(self, study: str, series: str, *, media_types: tuple) -> Iterator[Dataset]:
        self.downloads += 1
        if self.down:
            break_off()
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
                              "patient_id": "p 7", "series_id": SERIES_UID, "instances": 8}]  # fmt: skip
    assert not store.images_root.exists(), "nothing is downloaded before somebody asks for it"
    folder = Path(store.get_image_uri(SERIES_UID))
    assert kept(store) == [SERIES_UID]
    sent = sorted(path.read_bytes() for path in SERIES.iterdir())
    assert sorted(path.read_bytes() for path in folder.iterdir()) == sent
    assert store.path(SERIES_UID) == folder
    assert store._client.downloads == 1


def arriving(store: DicomwebStore, says_how_many: bool = True) -> list[Dataset]:
    """A download of a series of which the server has six images; those that it will have."""
    client = store._client = FakeClient()
    client.says_how_many, whole = says_how_many, client.images
    client.images = whole[:6]
    assert len(list(store.path(SERIES_UID).iterdir())) == 6
    store.update_image_info(SERIES_UID, {"entropy": 0.5, "entropy_by": "it", "ward": 3})
    return whole


@pytest.mark.parametrize("says_how_many", [True, False])
def test_a_series_that_was_still_arriving_is_fetched_again(store: DicomwebStore, says_how_many: bool) -> None:
    whole = arriving(store, says_how_many)
    store._client.images = whole
    assert len(list(store.path(SERIES_UID).iterdir())) == 6, "the list is not asked for each time"
    store.refresh()
    assert store.list_images() == [SERIES_UID]
    if says_how_many:
        assert "entropy" not in store.get_image_info(SERIES_UID), "the next scoring run takes it"
    assert {path.stem for path in store.path(SERIES_UID).iterdir()} == {image.SOPInstanceUID for image in whole}
    info = store.get_image_info(SERIES_UID)
    assert ("entropy" in info, "entropy_by" in info, info["ward"]) == (False, False, 3)
    assert kept(store) == [SERIES_UID]
    downloads = store._client.downloads
    for _ in range(2):
        store.refresh()
        assert store.path(SERIES_UID).is_dir()
    assert store._client.downloads == downloads, "once"


def test_a_list_older_than_the_download_does_not_fetch_it_again(store: DicomwebStore) -> None:
    whole = store._client.images
    store._client.images = whole[:6]
    assert store.items()[0]["instances"] == 6
    store._client.images = whole
    for _ in range(3):
        assert len(list(store.path(SERIES_UID).iterdir())) == 8
    assert store._client.downloads == 1


def test_a_server_that_counts_otherwise_does_not_cost_the_scores(store: DicomwebStore) -> None:
    store.path(SERIES_UID)
    store.update_image_info(SERIES_UID, {"entropy": 0.5})
    store._client.series[0] |= answer(NumberOfSeriesRelatedInstances="9")
    store._client.says_how_many = False
    for _ in range(2):
        store.refresh()
        store.path(SERIES_UID)
    assert store._client.downloads == 1
    assert store.get_image_info(SERIES_UID)["entropy"] == 0.5


def test_what_was_downloaded_is_used_if_the_new_images_cannot_be_had(store: DicomwebStore) -> None:
    whole = arriving(store)
    store._client.images = whole
    store.refresh()
    store._client.fault = break_off
    with pytest.raises(Unreachable, match="broke off"):
        store.path(SERIES_UID)
    assert kept(store) == [SERIES_UID], "half a series replaces nothing"
    store._client.down = True
    assert len(list(store.path(SERIES_UID).iterdir())) == 6, "the server is down, so it cannot be better"
    store._client.down, store._client.fault = False, None
    assert len(list(store.path(SERIES_UID).iterdir())) == 8


def test_the_list_is_kept_for_minutes_and_an_unknown_series_is_looked_for(
    store: DicomwebStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    store.list_images()
    asked = store._client.searches
    now += 200
    store.list_images(), store.status(), store.path(SERIES_UID)
    assert store._client.searches == asked
    store._client.series = [answer(SeriesInstanceUID="1.2.4", StudyInstanceUID=STUDY_UID), *store._client.series]
    assert store.get_image_info("1.2.4")["patient_id"] == STUDY_UID
    asked = store._client.searches
    now += 301
    store.list_images()
    assert store._client.searches > asked


def test_a_pacs_that_is_down_hides_nothing_that_is_here(
    store: DicomwebStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store.path(SERIES_UID)
    again = DicomwebStore("http://127.0.0.1:9/dicom-web", TABLE, tmp_path)  # another process
    (tmp_path / "label.json").write_text('{"groups": {"liver": "low"}}')
    for each in (store, again):
        each._client.down = True if each is store else None
        each.refresh()
        assert each.list_images() == [SERIES_UID]
        assert "the last list of the series is used" in caplog.text
        caplog.clear()
        assert each.items()[0]["patient_id"] == "p 7"
        assert each.path(SERIES_UID) == folder
        assert each.save_label(SERIES_UID, str(tmp_path / "label.json"), "final", {}) == SERIES_UID
        assert each.datalist()[0]["image"] == str(folder)
        with pytest.raises(Unreachable, match="asked for its series"):
            each.path("1.2.4")  # it may be there
    shutil.rmtree(folder)
    with pytest.raises(Unreachable, match="cannot be reached, or broke off"):
        store.path(SERIES_UID)
    store._client.down = False
    store.refresh()
    assert store.path(SERIES_UID) == folder


@pytest.mark.parametrize("content", ["{ broken", "[1]", '{"../../evil": {}}', '{"1.2": {"study_id": 1}}'])
def test_a_last_list_that_is_none_is_as_no_list(tmp_path: Path, content: str) -> None:
    store = DicomwebStore("http://127.0.0.1:9/dicom-web", TABLE, tmp_path)
    store.images_root.parent.mkdir(parents=True)
    (store.images_root.parent / "series.json").write_text(content)
    with pytest.raises(Unreachable, match="cannot be reached"):
        store.list_images()


def test_labels_can_have_a_folder_of_their_own(tmp_path: Path) -> None:
    cache, labels = tmp_path / "cache", tmp_path / "labels of ward 3"
    store = DicomwebStore("http://127.0.0.1:9/dicom-web", TABLE, cache, labels=labels)
    store._client = FakeClient()
    store.path(SERIES_UID)
    store.update_image_info(SERIES_UID, {"ward": 3})
    assert store.root == labels
    assert (labels / "labels" / ".notes" / f"{SERIES_UID}.json").is_file()
    assert not list(cache.rglob("labels"))


def test_the_cache_is_where_monai_label_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/dicom-web"
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / "old"))
    assert DicomwebStore(url, TABLE).root.parent == tmp_path / "old"
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_CACHE_PATH", str(tmp_path / "new"))
    assert DicomwebStore(url, TABLE).root.parent == tmp_path / "new"


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
