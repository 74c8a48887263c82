# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which patients the series of an inference belong to."""

from __future__ import annotations

import json
from pathlib import Path

from monai.bundle import ConfigParser

from bundles.rsna_cnn_lstm.scripts.inference_data import series_to_predict

CONFIG = Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/inference.json"


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_paths_stand_for_patients_only_where_nothing_names_them(tmp_path, caplog):
    files(tmp_path, "export/a.nii", "export/b.nii", "export/a_mask.nii", "rsna/test_images/7/1.nii")
    items = series_to_predict(str(tmp_path / "export"), exclude=["*mask*"])
    assert [item["patient_id"] for item in items] == ["a.nii", "b.nii"]
    assert caplog.text.count("each series counts as a patient of its own") == 1
    assert "2 of 2 series" in caplog.text
    caplog.clear()
    (tmp_path / "own.csv").write_text("image,patient_id,liver\na.nii,p,low\nb.nii,p,low\n")
    named = series_to_predict(str(tmp_path / "export"), str(tmp_path / "own.csv"))
    assert [(item["patient_id"], Path(item["image"]).name) for item in named] == [("p", "a.nii"), ("p", "b.nii")]
    content = {"training": [{"image": "a.nii", "patient_id": "p", "liver": "low", "findings": {"liver": [1]}}]}
    (tmp_path / "own.json").write_text(json.dumps(content))
    (one,) = series_to_predict(str(tmp_path / "export"), str(tmp_path / "own.json"))
    assert set(one) == {"image", "patient_id", "series_id"}
    series_to_predict(str(tmp_path / "export" / "a.nii"))  # one series is one patient's
    assert not caplog.text


def test_the_config_takes_a_datalist():
    data = ConfigParser.load_config_file(str(CONFIG))["dataset"]["data"]["items"]
    assert data == {"_target_": "scripts.inference_data.series_to_predict", "dataset_dir": "@dataset_dir",
                    "datalist": "@datalist", "exclude": "@exclude"}  # fmt: skip
