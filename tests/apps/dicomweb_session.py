# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The app over Orthanc, which listens on every address: `test_dicomweb.py` runs this file in a network namespace of its
own, where the loopback device is the only one. The tests follow one after the other and share their server."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from pydicom.uid import generate_uid

from apps.monailabel.lib.dicomweb_store import DicomwebStore

ROOT = Path(__file__).resolve().parents[2]
SERIES = ROOT / "tests" / "data" / "crlm_ct_1004"
UID = pydicom.dcmread(SERIES / "1-18.dcm", stop_before_pixels=True).SeriesInstanceUID
LABEL = {"groups": {"liver": "healthy", "spleen": "low"}}
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # of a network device, from linux/sockios.h and linux/if.h


def flags(device: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        reply = fcntl.ioctl(control, GET_FLAGS, struct.pack("16sh14x", device.encode(), 0))
    return struct.unpack("16sh14x", reply)[1]


@pytest.fixture(scope="session", autouse=True)
def loopback() -> None:
    others = [device for _, device in socket.if_nameindex() if device != "lo" and flags(device) & UP]
    assert not others, f"expected a network of its own, found {others}: run test_dicomweb.py"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sh14x", b"lo", flags("lo") | UP))


class Orthanc:
    """An Orthanc with its DICOMweb plugin."""

    url = "http://127.0.0.1:8042"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = {"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": 8042,
                  "DicomServerEnabled": False, "AuthenticationEnabled": False, "Plugins": [str(PLUGIN)],
                  "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin")
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen([program, str(self.folder / "orthanc.json")], stdout=log, stderr=log)
        for _ in range(200):
            try:
                requests.get(f"{self.url}/system", timeout=5)
                return
            except requests.RequestException:
                time.sleep(0.1)
        pytest.fail((self.folder / "log.txt").read_text()[-3000:])

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            self.process = None

    def send(self, content: bytes) -> None:
        requests.post(f"{self.url}/instances", data=content, timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Holds the real CT series, and an image of another modality."""
    server = Orthanc(tmp_path_factory.mktemp("orthanc"))
    server.start()
    for path in SERIES.iterdir():
        server.send(path.read_bytes())
    other = pydicom.dcmread(SERIES / "1-18.dcm")
    other.Modality, other.SeriesInstanceUID, other.SOPInstanceUID = "MR", generate_uid(), generate_uid()
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    content = BytesIO()
    other.save_as(content)
    server.send(content.getvalue())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(start_server: Callable[..., Any], orthanc: Orthanc, cache: Path) -> Callable[..., Any]:
    """Starts a server over Orthanc, again and again over the same cache."""
    return lambda **options: start_server(
        f"{orthanc.url}/dicom-web", environment={"MONAI_LABEL_DATASTORE_CACHE_PATH": str(cache)}, **options
    )


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Any:
    return start()


def downloaded(cache: Path) -> dict[str, int]:
    """Number of images of each series in the cache, whatever else is there included; locks are not."""
    found = [path for path in cache.glob("*/series/*") if path.suffix != ".lock"]
    return {path.name: len(list(path.iterdir())) for path in found}


def direct(folder: Path, weights: Path, out: Path, network: dict[str, Any]) -> dict[str, Any]:
    """What the bundle itself says of a series, by MONAI's command line."""
    options = {**network, "dataset_dir": str(folder), "weights": str(weights), "output_root": str(out), "run_name": "r"}
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        "configs/inference.json",
        "--num_workers=0",
    ]
    command += [f"--{key}={value}" for key, value in options.items()]
    subprocess.run(command, cwd=ROOT / "bundles" / "rsna_cnn_lstm", check=True, capture_output=True)
    return json.loads((out / "r" / "series" / "000001.json").read_text())


def test_the_series_are_listed_and_none_is_downloaded(server: Any, cache: Path) -> None:
    assert server.get("/info/").json()["datastore"] == {"total": 1, "completed": 0, "label_tags": {}}
    assert list(server.get("/datastore/", params={"output": "all"}).json()["objects"]) == [UID]
    for strategy in ("first", "random", "uncertain"):
        proposed = server.post(f"/activelearning/{strategy}").json()
        assert (proposed["id"], proposed["patient_id"]) == (UID, "CRLM-CT-1004")
    assert downloaded(cache) == {}


def test_the_prediction_is_that_of_the_bundle_on_the_same_files(
    server: Any, cache: Path, weights: Path, settings_file: Path, tmp_path: Path
) -> None:
    reply = server.post("/infer/rsna_cnn_lstm", params={"image": UID})
    assert reply.status_code == 200, reply.text
    settings = json.loads(settings_file.read_text())["rsna_cnn_lstm"]["inference"]
    expected = direct(SERIES, weights, tmp_path, {key: settings[key] for key in settings if key != "num_workers"})
    assert reply.json()["injuries"] == expected["probabilities"]
    assert reply.json()["any_injury"] == expected["any_injury"]
    assert downloaded(cache) == {UID: 8}
    [folder] = cache.glob("*/series/1*")
    assert sorted(path.read_bytes() for path in folder.iterdir()) == sorted(
        path.read_bytes() for path in SERIES.iterdir()
    )


@pytest.mark.parametrize("image", ["1.2.3", "../series", "/etc/passwd", f"{UID}/..", f"{UID}*"])
def test_an_unknown_series_is_not_found(server: Any, cache: Path, image: str) -> None:
    for reply in (
        server.post("/infer/rsna_cnn_lstm", params={"image": image}),
        server.get("/datastore/image/info", params={"image": image}),
        server.put("/datastore/label", params={"image": image}, files={"label": ("l.json", json.dumps(LABEL))}),
    ):
        assert reply.status_code == 404, reply.text
        assert image in reply.json()["detail"]
    assert downloaded(cache) == {UID: 8}


def test_scoring_is_noted_beside_the_cache(server: Any, cache: Path) -> None:
    assert server.post("/scoring/entropy").json()["status"] == "SUBMITTED"
    assert server.wait_for("scoring")["status"] == "DONE"
    expected = server.post("/infer/rsna_cnn_lstm", params={"image": UID}).json()["entropy"]
    assert server.post("/activelearning/uncertain").json()["entropy"] == expected
    assert len(list(cache.glob(f"*/labels/.notes/{UID}.json"))) == 1


def test_a_final_label_outlives_a_restart_and_stays_out_of_the_pacs(
    server: Any, start: Callable[..., Any], orthanc: Orthanc
) -> None:
    before = requests.get(f"{orthanc.url}/statistics", timeout=30).json()
    reply = server.put("/datastore/label", params={"image": UID}, files={"label": ("l.json", json.dumps(LABEL))})
    assert reply.json() == {"image": UID, "label": UID}
    server.stop()
    again = start(app=server.app)
    assert again.get("/info/").json()["datastore"] == {"total": 1, "completed": 1, "label_tags": {"final": 1}}
    assert again.get("/datastore/label", params={"label": UID, "tag": "final"}).json() == LABEL
    assert again.post("/activelearning/first").json() == {}
    assert requests.get(f"{orthanc.url}/statistics", timeout=30).json() == before


def test_a_pacs_that_is_down_is_named_and_one_that_comes_back_is_used(
    start: Callable[..., Any], orthanc: Orthanc, cache: Path
) -> None:
    server = start()
    shutil.rmtree(next(cache.glob("*/series/1*")))
    orthanc.stop()
    reply = server.post("/infer/rsna_cnn_lstm", params={"image": UID})
    assert reply.status_code == 502, reply.text
    assert "the DICOMweb server was asked for" in reply.json()["detail"]
    assert "cannot be reached" in reply.json()["detail"]
    assert downloaded(cache) == {}
    orthanc.start()
    assert server.post("/infer/rsna_cnn_lstm", params={"image": UID}).status_code == 200
    assert downloaded(cache) == {UID: 8}


def test_a_server_that_starts_while_the_pacs_is_down_works_with_what_it_has(
    server: Any, start: Callable[..., Any], orthanc: Orthanc, cache: Path
) -> None:
    assert downloaded(cache) == {UID: 8}
    orthanc.stop()
    again = start(app=server.app)
    assert again.get("/info/").json()["datastore"] == {"total": 1, "completed": 1, "label_tags": {"final": 1}}
    assert again.post("/infer/rsna_cnn_lstm", params={"image": UID}).status_code == 200
    reply = again.put("/datastore/label", params={"image": UID}, files={"label": ("l.json", json.dumps(LABEL))})
    assert reply.status_code == 200, reply.text
    reply = again.get("/datastore/image/info", params={"image": "1.2.3"})  # the server may have it by now
    assert (reply.status_code, "asked for its series" in reply.json()["detail"]) == (502, True)
    again.stop()
    orthanc.start()


def test_a_series_that_was_still_arriving_is_fetched_again(start: Callable[..., Any], orthanc: Orthanc) -> None:
    images = [pydicom.dcmread(path) for path in sorted(SERIES.iterdir())]
    uid, cache = generate_uid(), orthanc.folder / "another cache"
    contents = []
    for image in images:
        image.SeriesInstanceUID, image.SOPInstanceUID = uid, generate_uid()
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        content = BytesIO()
        image.save_as(content)
        contents.append(content.getvalue())
    for content in contents[:6]:
        orthanc.send(content)
    store = DicomwebStore(f"{orthanc.url}/dicom-web", None, cache)
    assert {item["id"]: item["instances"] for item in store.items()} == {UID: 8, uid: 6}
    assert len(list(store.path(uid).iterdir())) == 6
    store.update_image_info(uid, {"entropy": 0.5})
    for content in contents[6:]:
        orthanc.send(content)
    store.refresh()
    assert store.items()[[item["id"] for item in store.items()].index(uid)]["instances"] == 8
    assert "entropy" not in store.get_image_info(uid)
    assert len(list(store.path(uid).iterdir())) == 8
