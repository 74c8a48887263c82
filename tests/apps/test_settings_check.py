# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings that would fail at their first use, or train weights that no answer fits: refused at the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.monailabel.lib.bundles import SetupError, read_setup
from apps.monailabel.lib.settings_check import check_settings

from .conftest import APP, ROOT, SETTINGS

CLASSIFIER, PRETRAINING = "rsna_cnn_lstm", "voco2d_pretrain"


def check(folder: Path, settings: dict[str, object]) -> None:
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    check_settings(read_setup(APP, {"settings": str(path)}))


def test_settings_that_fit_are_taken(tmp_path: Path) -> None:
    check_settings(read_setup(APP, {}))
    check(tmp_path, SETTINGS)
    network = {"volume_size": [64, 64, 16], "pool": "gem"}
    check(tmp_path, {CLASSIFIER: {"inference": network, "train": network}})
    check(tmp_path, {CLASSIFIER: {"train": {"max_epochs": 3, "train#trainer#amp": False}, "evaluate": {"tta": ["x"]}}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({CLASSIFIER: {"inference": {"evidence_slice": 3}}}, "inference: unknown override 'evidence_slice': did you"
                                                             " mean evidence_slices"),
        ({CLASSIFIER: {"train": {"learning_rat": 3}}}, "train: unknown override 'learning_rat': did you mean"
                                                       " learning_rate"),
        ({CLASSIFIER: {"evaluate": {"reprt": False}}}, "evaluate: unknown override 'reprt': did you mean report"),
        ({CLASSIFIER: {"inference": {"max_epochs": 3}}}, "inference: unknown override 'max_epochs'"),
        ({CLASSIFIER: {"train": {"train#trainr#amp": True}}}, "train: unknown override 'train#trainr#amp'"),
        ({PRETRAINING: {"train": {"crop_sise": [1, 1]}}}, "voco2d_pretrain, train: unknown override 'crop_sise': did"
                                                          " you mean crop_size"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_refused_with_near_misses(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(SetupError) as raised:
        check(tmp_path, settings)
    assert words in str(raised.value)


def test_every_misspelt_name_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"--conf settings: .*'poool'.*'reprt'"):
        check(tmp_path, {CLASSIFIER: {"train": {"poool": "avg"}, "evaluate": {"reprt": False}}})


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        # the reviewed case: a training makes weights that every answer then refuses
        ({"train": {"volume_size": [64, 64, 16]}}, "volume_size is [256, 256, 96] in inference and [64, 64, 16] in"),
        ({"inference": {"pool": "gem"}}, "pool is 'gem' in inference and 'avg' in train"),
        ({"inference": {"pool": "gem"}, "train": {"pool": "gem"}, "evaluate": {"pool": "avg"}},
         "pool is 'avg' in evaluate and 'gem' in train"),
        ({"inference": {"groups": ["liver"]}}, "groups is ['liver'] in inference and None in train"),
    ],
)  # fmt: skip
def test_settings_that_would_train_weights_that_do_not_fit_are_refused(
    tmp_path: Path, configs: dict[str, object], words: str
) -> None:
    with pytest.raises(SetupError) as raised:
        check(tmp_path, {CLASSIFIER: configs})
    assert words in str(raised.value)
    assert "Give the same values" in str(raised.value)


def test_a_difference_may_be_meant(tmp_path: Path) -> None:
    check(tmp_path, {CLASSIFIER: {"inference": {"num_slices": 32, "allow_config_mismatch": True}}})


def test_the_server_does_not_start_with_them(tmp_path: Path) -> None:
    settings, studies = tmp_path / "settings.json", tmp_path / "studies"
    settings.write_text(json.dumps({CLASSIFIER: {"train": {"hidden_size": 16}}}))
    studies.mkdir()
    code = ("import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from main import InjuryApp;"
            " InjuryApp(sys.argv[1], sys.argv[2], {'settings': sys.argv[3], 'output_root': sys.argv[4]})")  # fmt: skip
    environment = {**os.environ, "MONAI_LABEL_APP_CONF": json.dumps({"bundles": str(ROOT / "bundles")})}
    command = [sys.executable, "-c", code, str(APP), str(studies), str(settings), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "hidden_size is 128 in inference and 16 in train" in ended.stderr
