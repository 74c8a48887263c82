# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A real server answers as the bundle does, to the last digit, whoever asks and how many at once."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import scipy.stats

from .conftest import NETWORK, ROOT, Server

DATA = ROOT / "tests" / "data"
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
NIFTI, DICOM, BROKEN = "lidc_idri_0001.nii.gz", "case 7/venous", "cut_off.nii.gz"
INFER = "/infer/rsna_cnn_lstm"


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NIfTI file, a DICOM series and a file that cannot be read."""
    folder = tmp_path_factory.mktemp("studies")
    shutil.copytree(DATA / "crlm_ct_1004", folder / DICOM)
    shutil.copy(DATA / NIFTI, folder)
    (folder / BROKEN).write_bytes((DATA / NIFTI).read_bytes()[:20_000])
    return folder


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], studies: Path) -> Server:
    return start_server(studies)


@pytest.fixture(scope="module")
def direct(studies: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `python -m monai.bundle run` of the bundle's own config says of each image, in the same environment."""
    found = {}
    for number, image in enumerate((NIFTI, DICOM)):
        out = tmp_path_factory.mktemp("direct")
        overrides = {**NETWORK, "num_workers": 0, "dataset_dir": str(studies / image), "weights": str(weights),
                     "output_root": str(out), "run_name": str(number)}  # fmt: skip
        (out / "overrides.json").write_text(json.dumps(overrides))
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file",
                   f"['configs/inference.json', {str(out / 'overrides.json')!r}]"]  # fmt: skip
        subprocess.run(command, cwd=BUNDLE, check=True, capture_output=True)
        found[image] = json.loads((out / str(number) / "series" / "000001.json").read_text())
    return found


def zipped(folder: Path) -> bytes:
    """A zip as people make them: a folder within, and what archivers and media add."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"export/series 1/{path.name}")
        archive.writestr("__MACOSX/export/._1-18.dcm", b"resource fork")
        archive.writestr("DICOMDIR", b"directory")
    return buffer.getvalue()


def test_info_names_model_version_strategies_and_scoring(server: Server) -> None:
    info = server.get("/info/").json()
    model = info["models"]["rsna_cnn_lstm"]
    assert model["type"] == "classification"
    assert model["version"] == "shipped"
    assert model["groups"]["spleen"] == ["healthy", "low", "high"]
    assert set(info["strategies"]) == {"first", "random", "uncertain"}
    assert set(info["scoring"]) == {"entropy"}
    assert set(info["trainers"]) == {"rsna_cnn_lstm", "voco2d_pretrain"}
    assert info["datastore"]["total"] == 3


@pytest.mark.parametrize("image", [NIFTI, DICOM])
def test_probabilities_are_those_of_the_bundle_to_the_last_digit(server: Server, direct: dict, image: str) -> None:
    reply = server.post(INFER, params={"image": image})
    assert reply.status_code == 200, reply.text
    content = reply.json()
    assert content["injuries"] == direct[image]["probabilities"]
    assert content["any_injury"] == direct[image]["any_injury"]
    assert [content["model"], content["version"], content["image"]] == ["rsna_cnn_lstm", "shipped", image]
    flat = {item["label"]: item["score"] for item in content["prediction"]}
    assert flat["liver_low"] == content["injuries"]["liver"]["low"]
    assert len(flat) == 13
    groups = [list(classes.values()) for classes in content["injuries"].values()]
    assert content["entropy"] == pytest.approx(np.mean([scipy.stats.entropy(p, base=len(p)) for p in groups]))


def test_uploads_answer_as_the_images_of_the_studies(server: Server, studies: Path, direct: dict) -> None:
    uploads = {NIFTI: (studies / NIFTI).read_bytes(), DICOM: zipped(studies / DICOM)}
    for image, content in uploads.items():
        reply = server.post(INFER, files={"file": ("x.bin", content)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["injuries"] == direct[image]["probabilities"]


def test_a_path_of_an_image_means_that_image(server: Server, studies: Path, direct: dict) -> None:
    for path in (studies / DICOM, "./case 7/../case 7/venous"):
        assert server.post(INFER, params={"image": str(path)}).json()["injuries"] == direct[DICOM]["probabilities"]


def test_evidence_comes_when_it_is_asked_for(server: Server) -> None:
    reply = server.post(
        INFER, params={"image": NIFTI}, data={"params": json.dumps({"evidence": True, "device": "cpu"})}
    )
    evidence = reply.json()["evidence"]
    assert set(evidence["groups"]) == {"bowel", "extravasation", "kidney", "liver", "spleen"}
    assert len(evidence["slice_z_mm"]) == NETWORK["num_slices"]
    assert len(evidence["groups"]["liver"]["top_slices"]) == 3


def test_save_label_keeps_the_prediction(server: Server, studies: Path, direct: dict) -> None:
    reply = server.post(INFER, params={"image": DICOM}, data={"params": '{"save_label": true}'})
    assert reply.json()["label"] == DICOM
    kept = server.get("/datastore/label", params={"label": DICOM, "tag": "original"}).json()
    assert kept["injuries"] == direct[DICOM]["probabilities"]
    assert (studies / "labels" / "original" / f"{DICOM}.json").is_file()
    assert (
        server.get("/datastore/label/info", params={"label": DICOM, "tag": "original"}).json()["version"] == "shipped"
    )


@pytest.mark.parametrize("run_sync", [True, False])
def test_batch_infer_goes_on_after_an_unreadable_image(server: Server, direct: dict, run_sync: bool) -> None:
    server.request("DELETE", "/datastore/label", params={"id": NIFTI, "tag": "original"})
    reply = server.post("/batch/infer/rsna_cnn_lstm", params={"images": "all", "run_sync": run_sync})
    assert reply.status_code == 200, reply.text
    if run_sync:
        assert "damaged" in reply.json()[BROKEN]["error"]
        assert reply.json()[NIFTI]["label"] == NIFTI
    else:
        assert server.wait_for("batch/infer")["status"] == "DONE"
    for image in (NIFTI, DICOM):
        kept = server.get("/datastore/label", params={"label": image, "tag": "original"}).json()
        assert kept["injuries"] == direct[image]["probabilities"]
    assert server.get("/datastore/").json()["label_tags"] == {"original": 2}


def test_ten_clients_at_once_get_right_answers_and_memory_stays_bounded(server: Server, direct: dict) -> None:
    def ask(number: int) -> tuple[str, int, object]:
        image = (NIFTI, DICOM, BROKEN)[number % 3]
        reply = server.post(INFER, params={"image": image}, timeout=300)
        return image, reply.status_code, reply.json().get("injuries")

    process = psutil.Process(server.process.pid)
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(ask, range(20)))
        before = process.memory_info().rss
        answers += clients.map(ask, range(40))
        after = process.memory_info().rss
    for image, status, injuries in answers:
        assert (status, injuries) == ((422, None) if image == BROKEN else (200, direct[image]["probabilities"]))
    assert after - before < 40e6, f"RSS {before / 1e6:.0f} MB after 20 requests, {after / 1e6:.0f} MB after 40 more"
    assert len(process.open_files()) < 20


def test_no_file_is_left_of_an_answer(server: Server) -> None:
    before = set(server.temporary.iterdir())  # MONAI Label's own logging configuration, from its start
    for params in ({}, {"save_label": True}):
        assert server.post(INFER, params={"image": NIFTI}, data={"params": json.dumps(params)}).ok
    left = {path.name for path in set(server.temporary.iterdir()) - before}
    assert not [name for name in left if name.endswith(".json") or name.startswith(("label-", "inference-"))], left


def test_nobody_waits_for_answers_that_nobody_reads(server: Server) -> None:
    def seconds() -> float:
        start = time.monotonic()
        assert server.post(INFER, params={"image": NIFTI}).ok
        return time.monotonic() - start

    alone = max(seconds() for _ in range(3))

    def give_up(number: int) -> None:
        with pytest.raises(requests.Timeout):
            server.post(INFER, params={"image": NIFTI}, timeout=min(0.05, alone / 4))

    with ThreadPoolExecutor(30) as clients:
        list(clients.map(give_up, range(30)))
    assert seconds() < 10 * alone + 1, f"one alone took {alone:.2f} s"


def test_info_is_answered_while_inference_is_busy(server: Server) -> None:
    with ThreadPoolExecutor(12) as clients:
        busy = [clients.submit(server.post, INFER, params={"image": NIFTI}, timeout=300) for _ in range(12)]
        assert server.get("/info/", timeout=5).ok
        assert not all(request.done() for request in busy)
        assert all(request.result().ok for request in busy)
