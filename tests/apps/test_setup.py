# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What `--conf` may say, and what a background task says of itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from apps.monailabel.lib.bundles import SetupError, left_aside, read_setup
from apps.monailabel.lib.task_state import task_state

from .conftest import APP, ROOT, UNWEIGHTED


def test_defaults_are_those_of_a_checkout(tmp_path: Path) -> None:
    setup = read_setup(APP, {})
    assert setup.bundle("rsna_cnn_lstm") == ROOT / "bundles" / "rsna_cnn_lstm"
    assert setup.weights is None  # the repository's own, whose card warns, are not for a server
    assert setup.models == ("rsna_cnn_lstm", "voco2d_pretrain")
    assert setup.output_root == APP / "model"
    assert (setup.device, setup.upload_limit) == (None, 2_048_000_000)
    assert setup.unpacked_limit == 2_048_000_000
    assert (setup.hosts, setup.labels, setup.patients) == ((), None, None)
    assert setup.overrides("rsna_cnn_lstm", "train") == {}


def test_weights_whose_card_warns_are_served_only_where_they_are_named(tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    shutil.copytree(ROOT / "bundles", bundles, ignore=UNWEIGHTED)
    conf, file = {"bundles": str(bundles)}, bundles / "rsna_cnn_lstm" / "models" / "model.pt"
    assert (read_setup(APP, conf).weights, left_aside(bundles)) == (file, None)  # absent: it may come
    file.parent.mkdir()
    file.write_bytes(b"weights")
    assert (read_setup(APP, conf).weights, left_aside(bundles)) == (file, None)  # one's own, without a card
    card = f"> **Not for clinical use.**\n\n{hashlib.sha256(b'weights').hexdigest()}\n"
    file.with_name("MODEL_CARD.md").write_text(card)
    assert read_setup(APP, conf).weights is None
    assert str(left_aside(bundles)).startswith(f"{file} is not served: Not for clinical use. ")
    assert read_setup(APP, {**conf, "weights": str(file)}).weights == file


def test_every_conf_is_taken(tmp_path: Path) -> None:
    for name in ("model.pt", "patients.csv"):
        (tmp_path / name).write_bytes(b"")
    paths = {"labels": tmp_path / "labels", "patients": tmp_path / "patients.csv", "weights": tmp_path / "model.pt"}
    setup = read_setup(
        APP, {key: str(path) for key, path in paths.items()} | {"hosts": "CT.example, x", "unpacked_limit_mb": "8"}
    )
    assert {key: getattr(setup, key) for key in paths} == paths
    assert (setup.hosts, setup.unpacked_limit) == (("ct.example", "x"), 8_000_000)


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"modles": "x"}, "modles: unknown; known are models, bundles"),
        ({"models": "spleen"}, "models: expected some of rsna_cnn_lstm, voco2d_pretrain, got 'spleen'"),
        ({"models": ","}, "models: expected some of"),
        ({"bundles": "/nowhere"}, "bundles: expected rsna_cnn_lstm/configs/inference.json in /nowhere"),
        ({"settings": "/nowhere.json"}, "settings: expected a JSON file"),
        ({"upload_limit_mb": "-1"}, "upload_limit_mb: expected a number above 0"),
        ({"upload_limit_mb": "much"}, "upload_limit_mb: expected a number above 0"),
        ({"unpacked_limit_mb": "0"}, "unpacked_limit_mb: expected a number above 0"),
        ({"weights": "/nowhere.pt"}, "weights: expected a file, found none at /nowhere.pt"),
        ({"patients": "/nowhere.csv"}, "patients: expected a file, found none at /nowhere.csv"),
    ],
)
def test_a_wrong_conf_is_named(conf: dict[str, str], words: str) -> None:
    with pytest.raises(SetupError, match=words):
        read_setup(APP, conf)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected a JSON file"),
        ("[]", "found a list"),
        ('{"spleen": {}}', "found 'spleen'"),
        ('{"voco2d_pretrain": {"inference": {}}}', "'inference'"),
        ('{"rsna_cnn_lstm": {"inference": {"weights": "x.pt"}}}', "weights is set by the app itself"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(SetupError, match=words):
        read_setup(APP, {"settings": str(path)})


def test_settings_are_overrides_of_one_config(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"rsna_cnn_lstm": {"train": {"max_epochs": 3}}}))
    setup = read_setup(APP, {"settings": str(path), "models": " rsna_cnn_lstm ,"})
    assert setup.models == ("rsna_cnn_lstm",)
    assert setup.overrides("rsna_cnn_lstm", "train") == {"max_epochs": 3}
    assert setup.overrides("rsna_cnn_lstm", "inference") == setup.overrides("voco2d_pretrain", "train") == {}


def test_a_tasks_lines_hold_no_trace_and_no_path() -> None:
    lines = [
        "[INFO] (lib.train) - epoch 1 of 3, results in /home/someone/app/model/runs/1",
        "Traceback (most recent call last):",
        '  File "/home/someone/app/main.py", line 7, in <module>',
        "    run(image)",
        "        ^^^^^^",
        "ValueError: case 7/venous: expected 3, found 4; see http://127.0.0.1:8000/train/",
    ]
    state = task_state({"id": "1", "status": "ERROR", "details": lines})
    assert state["details"] == [
        "[INFO] (lib.train) - epoch 1 of 3, results in .../1",
        "ValueError: case 7/venous: expected 3, found 4; see http://127.0.0.1:8000/train/",
    ]
    assert task_state(None) is None


def test_a_tasks_lines_hold_no_folder_of_the_server_whatever_its_name() -> None:
    folders = [Path("/data/CT of 2024"), Path("/data"), Path("/")]
    lines = ["ERROR: /data/CT of 2024/case 7/venous: expected 3", "saved /data/out.pt, not /home/a b/c.pt"]
    assert task_state({"details": lines}, folders)["details"] == [
        "ERROR: case 7/venous: expected 3",
        "saved out.pt, not .../a b/c.pt",
    ]
