# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a run against those of the weights' training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from workflow.provenance import (
    ConfigMismatch,
    SeenPatients,
    check_training_config,
    check_unseen_patients,
    record_patients,
)

SETTINGS = {"window": (-175, 250), "num_slices": 48, "backbone_kwargs": {"a": [1]}, "groups": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder."""
    content = {**SETTINGS, "seed": 3, "cache_dir": "$@output_root"}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["model.pt", "checkpoints/checkpoint_4.pt"])
def test_names_what_differs_with_both_values(run, name):
    check_training_config(run / name, SETTINGS)
    with pytest.raises(ConfigMismatch) as caught:
        check_training_config(str(run / name), {**SETTINGS, "window": [-100, 300], "num_slices": 24})
    text = str(caught.value)
    assert f"{run / name}: window was [-175, 250] in training and is [-100, 300] here" in text
    assert "num_slices was 48 in training and is 24 here" in text
    assert "backbone_kwargs" not in text
    assert "--allow_config_mismatch True" in text


def test_every_file_of_an_ensemble_is_compared(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_text(json.dumps({**SETTINGS, "num_slices": 12}), encoding="utf-8")
    with pytest.raises(ConfigMismatch, match=rf"{other}/model.pt: num_slices was 12 in training and is 48"):
        check_training_config([str(run / "model.pt"), str(other / "model.pt")], SETTINGS)


def test_allowed_differences_are_logged(run, caplog):
    with caplog.at_level(logging.WARNING):
        check_training_config(run / "model.pt", {"num_slices": 24}, allow=True)
    assert "num_slices was 48 in training and is 24 here" in caplog.text


def test_what_cannot_be_compared_is_not(run, tmp_path_factory, caplog):
    check_training_config(None, SETTINGS)
    check_training_config(run / "model.pt", {"cache_dir": "/data/cache", "new_name": 1})  # an expression, no name yet
    with caplog.at_level(logging.INFO):
        check_training_config(tmp_path_factory.mktemp("published") / "model.pt", SETTINGS)
    assert "settings cannot be compared" in caplog.text


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigMismatch, match=r"config\.json: expected the JSON config of a training"):
        check_training_config(tmp_path / "model.pt", SETTINGS)


ITEMS = [{"patient_id": name} for name in ("10", "11", "11", "12")]


@pytest.mark.parametrize("name", ["model.pt", "checkpoints/checkpoint_4.pt"])
def test_patients_of_the_training_are_not_scored(tmp_path, name, caplog):
    record_patients(tmp_path, ITEMS)
    assert "11" not in json.loads((tmp_path / "training_patients.json").read_text())
    check_unseen_patients(tmp_path / name, [{"patient_id": "13"}])
    scored = [{"patient_id": "13"}, {"patient_id": "11"}, {"patient_id": "11"}]
    with pytest.raises(SeenPatients, match=rf"{name} was trained on 1 of the 2 patients to be scored"):
        check_unseen_patients([str(tmp_path / name)], scored)
    with caplog.at_level(logging.WARNING):
        check_unseen_patients(str(tmp_path / name), scored, allow=True)
    assert "no estimate for new patients" in caplog.text


def test_without_a_list_of_patients_nothing_can_be_told(tmp_path, caplog):
    record_patients(tmp_path, ITEMS, write=False)
    assert not list(tmp_path.iterdir())
    check_unseen_patients(None, ITEMS)
    with caplog.at_level(logging.INFO):
        check_unseen_patients(tmp_path / "model.pt", ITEMS)
    assert "seen patients cannot be told" in caplog.text
