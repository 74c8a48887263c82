# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The folders that the commands of the bundles' READMEs name, made of phantoms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd

__all__ = ["workspace"]


def workspace(top: Path, phantoms: Path) -> None:
    """What /workspace stands for in the READMEs."""
    data, output = top / "data", top / "output"
    (output / "pretrain").mkdir(parents=True)
    (data / "abdominal_ct" / "train_images").mkdir(parents=True)
    (data / "rsna-2023-abdominal-trauma-detection").symlink_to(phantoms)
    labels = pd.read_csv(phantoms / "train.csv", dtype={"patient_id": str})
    patients = labels["patient_id"].tolist()
    for patient in patients[:8]:
        (data / "abdominal_ct" / "train_images" / patient).symlink_to(phantoms / "train_images" / patient)
    series = {patient: sorted((phantoms / "train_images" / patient).iterdir())[0] for patient in patients}
    shutil.copytree(series[patients[0]], data / "new_series")
    pd.DataFrame({"patient_id": patients, "fold": [str(i % 5) for i in range(len(patients))]}).to_csv(
        data / "folds.csv", index=False
    )
    classes = [c.removeprefix("liver_") for c in labels.columns if c.startswith("liver_")]
    liver = labels[[f"liver_{name}" for name in classes]].to_numpy().argmax(axis=1)
    items = [
        {"image": str(series[p].relative_to(phantoms)), "patient_id": p, "liver": classes[c], "spleen": "healthy"}
        for p, c in zip(patients, liver, strict=True)
    ]
    (data / "train_images").symlink_to(phantoms / "train_images")
    (data / "datalist.json").write_text(json.dumps({"training": items}))
    table = pd.DataFrame(items).drop(columns="spleen")
    table.insert(0, "spleen_healthy", 1)
    table.assign(spleen_low=0, spleen_high=0).to_csv(data / "own.csv", index=False)
