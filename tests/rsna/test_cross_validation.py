# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Order, resumption and pooling of a cross-validation, with stand-ins for the commands that train and evaluate.

`tests/bundles/test_cross_validation.py` runs the real ones.
"""

from __future__ import annotations

import ast
import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from monai.bundle import ConfigParser
from workflow.datalist import DatalistError

from bundles.rsna_cnn_lstm.scripts import cross_validation, report
from bundles.rsna_cnn_lstm.scripts.cross_validation import CrossValidation, CrossValidationError
from bundles.rsna_cnn_lstm.scripts.fold_file import FoldFile
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.report import ReportError
from bundles.rsna_cnn_lstm.scripts.score import frequency_baseline, rsna_score

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
TABLE = LabelTable.from_dict(
    {"groups": [{"name": "liver", "classes": [{"name": "healthy"}, {"name": "injury", "score_weight": 2}]}]}
)


class Commands:
    """Stands for subprocess.run: notes the merged config of each command and leaves what the real ones leave."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.configs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, list[str]] = {}
        self.failing: set[str] = set()

    def __call__(self, command: list[str], check: bool, pass_fds: tuple[int, ...]) -> subprocess.CompletedProcess:
        assert len(pass_fds) == 1  # the lock
        assert command[1:5] == ["-m", "monai.bundle", "run", "--config_file"]
        files = ast.literal_eval(command[5])
        config = ConfigParser.load_config_files(files)
        folder = Path(config["run_folder"]["output_root"]) / config["run_folder"]["run_name"]
        self.calls.append(folder.name)
        self.configs[folder.name], self.files[folder.name] = config, files
        folder.mkdir(exist_ok=True)
        (folder / "log.txt").touch()
        if folder.name in self.failing:
            return subprocess.CompletedProcess(command, 3)
        if folder.name.endswith("scores"):
            self.predict(folder, config)
        (folder / "run.json").write_text(json.dumps({"result": "completed"}))
        return subprocess.CompletedProcess(command, 0)

    @staticmethod
    def predict(folder: Path, config: dict[str, Any]) -> None:
        folds = pd.read_csv(config["folds_file"], dtype=str)
        patients = folds.loc[folds["fold"] == str(config["fold"]), "patient_id"].tolist()
        rng = np.random.default_rng(config["fold"])
        rows = [(p, f"{p}{k}", v) for p in patients for k, v in enumerate(rng.random(2))]
        series = pd.DataFrame(rows, columns=["patient_id", "series_id", "liver_injury"])
        series.insert(2, "liver_healthy", 1 - series["liver_injury"])
        series.assign(json_file="series/1.json").to_csv(folder / "series_predictions.csv", index=False)
        truth = pd.DataFrame({"patient_id": patients, "liver_injury": [int(p) % 2 for p in patients]})
        truth.assign(liver_healthy=1 - truth["liver_injury"]).to_csv(folder / "solution.csv", index=False)


@pytest.fixture
def commands(monkeypatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(cross_validation.subprocess, "run", commands)
    return commands


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs a cross-validation of 12 patients with two series each, as if by a config with such content."""
    for i in range(12):
        for k in range(2):
            (tmp_path / f"{i:02d}_{k}.nii").touch()
    lines = [f"{i:02d}_{k}.nii,{i:02d},{('healthy', 'injury')[i % 2]}" for i in range(12) for k in range(2)]
    (tmp_path / "own.csv").write_text("\n".join(["image,patient_id,liver", *lines]))

    def run(folds_file: Path | None = None, **content: Any) -> CrossValidation:
        folder = tmp_path / "run"
        folds = FoldFile(folder / "folds.csv", None, TABLE, str(tmp_path / "own.csv"), num_folds=3)
        train = ConfigParser.load_config_files(str(BUNDLE / "configs" / "train.json"))
        content = {
            **train,
            "n_resamples": 20,
            "cross_validation": {},
            "folds": {},
            "run": [],
            "finalize": [],
            **content,
        }
        monkeypatch.setattr(cross_validation, "running_config", lambda: content)
        work = CrossValidation(folder, str(BUNDLE), folds, folds_file, TABLE, n_resamples=20)
        work.run()
        return work

    return run


EVERY = ["fold_0", "fold_0_scores", "fold_1", "fold_1_scores", "fold_2", "fold_2_scores"]


def test_each_fold_is_trained_and_evaluated_with_the_content_of_the_run(commands, start, tmp_path):
    start(max_epochs=7, cache_dir="$@output_root + '/c'", datalist="own.csv", fold=2, resume="latest", run_name="r")
    assert commands.calls == EVERY
    train = ConfigParser.load_config_files(str(BUNDLE / "configs" / "train.json"))
    evaluate = ConfigParser.load_config_file(str(BUNDLE / "configs" / "evaluate.json"))
    for name, config in commands.configs.items():
        assert config["max_epochs"] == 7
        assert config["output_root"] == train["output_root"]  # what hangs on it means the same in every fold
        assert config["cache_dir"] == "$@output_root + '/c'"
        assert config["fold"] == int(name[5])
        assert config["folds_file"] == str(tmp_path / "run" / "folds.csv")
        assert config["run_folder"]["output_root"] == str(tmp_path / "run")
        assert config["run_folder"]["resume"] == "@resume"
        assert config["resume"] is None
        assert commands.files[name][0] == str(BUNDLE / "configs" / "train.json")  # MONAI finds the bundle by it
        own = evaluate if name.endswith("scores") else train
        assert (config["run"], config["finalize"]) == (own["run"], own["finalize"])
    scores = commands.configs["fold_1_scores"]
    assert scores["weights"] == str(tmp_path / "run" / "fold_1" / "model.pt")
    assert scores["n_resamples"] == 20
    assert scores["part"] == "validation"
    assert scores["validate"]["handlers"] == evaluate["validate#handlers"]


def test_predictions_of_all_folds_are_pooled_with_each_folds_own_baseline(commands, start, tmp_path):
    start()
    folder = tmp_path / "run"
    ids = {"patient_id": str, "series_id": str}
    series = pd.read_csv(folder / "series_predictions.csv", dtype=ids)
    patients, solution = (pd.read_csv(folder / f"{n}.csv", dtype=ids) for n in ("predictions", "solution"))
    folds = pd.read_csv(folder / "folds.csv", dtype={"patient_id": str}).set_index("patient_id")["fold"]
    assert series["series_id"].tolist() == [f"{i:02d}{k}" for i in range(12) for k in range(2)]
    assert (series["fold"] == series["patient_id"].map(folds)).all()
    assert series["json_file"].str.match(r"fold_\d_scores/series/1.json").all()
    expected = series.groupby("patient_id")["liver_injury"].max()
    assert patients["patient_id"].tolist() == solution["patient_id"].tolist() == sorted(folds.index)
    np.testing.assert_allclose(patients["liver_injury"], expected)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["patients"] == 12
    assert metrics["score"]["value"] == pytest.approx(rsna_score(solution, patients, TABLE)["score"])
    assert metrics["score"]["low"] <= metrics["score"]["value"] <= metrics["score"]["high"]
    constant = pd.concat(
        [
            frequency_baseline(
                solution[solution["patient_id"].map(folds) != fold], list(folds.index[folds == fold]), TABLE
            )
            for fold in range(3)
        ]
    )
    assert metrics["baseline"]["score"] == pytest.approx(rsna_score(solution, constant, TABLE)["score"])


def test_a_failing_fold_does_not_stop_the_others_and_is_named(commands, start, tmp_path):
    commands.failing = {"fold_1", "fold_2_scores"}
    with pytest.raises(CrossValidationError) as caught:
        start()
    assert commands.calls == [name for name in EVERY if name != "fold_1_scores"]
    message = str(caught.value)
    assert message.startswith("2 of 3 folds failed: fold_1 ended with exit status 3 (its error stands above")
    assert f"its log in {tmp_path}/run/fold_2_scores)" in message
    assert not (tmp_path / "run" / "metrics.json").exists()
    commands.calls, commands.failing = [], set()
    start()  # goes on with what is left, in the folders that are there
    assert commands.calls == ["fold_1", "fold_1_scores", "fold_2_scores"]
    assert [commands.configs[name]["resume"] for name in commands.calls] == ["latest", None, "latest"]
    assert (tmp_path / "run" / "metrics.json").is_file()
    commands.calls = []
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    start()
    assert commands.calls == []
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_series_that_the_folds_left_out_are_listed_once(commands, start, tmp_path):
    for name in ("fold_0", "fold_1", "fold_1_scores"):
        (tmp_path / "run" / name).mkdir(parents=True)
        pd.DataFrame([("a", "bad")], columns=["image", "reason"]).to_csv(
            tmp_path / "run" / name / "failed.csv", index=False
        )
    assert start().failed == [("a", "bad")]


def test_other_values_than_it_was_begun_with_are_refused(commands, start):
    start(max_epochs=2)
    start(max_epochs=2, num_workers=0, device="cpu", cache_dir="elsewhere")  # where and how fast, not what
    with pytest.raises(CrossValidationError, match="was begun with other values of dropout, max_epochs"):
        start(max_epochs=3, dropout=0.5)


def test_a_report_that_fails_is_listed_and_may_be_left_out_on_resuming(commands, start, tmp_path, monkeypatch):
    def fails(*_arguments: object) -> None:
        raise ReportError("lacks a part")

    monkeypatch.setattr(report, "_page", fails)
    assert start().failed == [(str(tmp_path / "run" / "report.html"), "lacks a part")]
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert start(report=False).folder == tmp_path / "run"


def test_a_fold_file_is_copied_and_its_test_patients_are_left_out(commands, start, tmp_path):
    given = tmp_path / "given.csv"
    rows = [f"{i:02d},{'test' if i < 2 else i % 2 + 3}" for i in range(12)]
    given.write_text("\n".join(["patient_id,fold", *rows]) + "\n")
    start(folds_file=given)
    assert commands.calls == ["fold_3", "fold_3_scores", "fold_4", "fold_4_scores"]
    assert (tmp_path / "run" / "folds.csv").read_bytes() == given.read_bytes()
    assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 10
    start(folds_file=given)
    given.write_text("\n".join(["patient_id,fold", *rows[::-1]]) + "\n")
    with pytest.raises(CrossValidationError, match="was begun with other folds than those of"):
        start(folds_file=given)


def test_a_fold_file_that_is_none_ends_it_before_anything_is_trained(commands, start, tmp_path):
    (tmp_path / "bad.csv").write_text("patient,fold\n1,0\n")
    with pytest.raises(DatalistError, match="expected a CSV with patient_id and fold"):
        start(folds_file=tmp_path / "bad.csv")
    assert commands.calls == []


def test_several_processes_are_refused(commands, start):
    with pytest.raises(CrossValidationError, match=r"leave out multi_gpu_train\.json"):
        start(distributed={})
    with pytest.raises(CrossValidationError, match=r"each fold has its own: /some/checkpoint_1\.pt"):
        start(resume="/some/checkpoint_1.pt")


def test_a_fold_that_outlived_the_command_is_waited_for(commands, start, tmp_path):
    (tmp_path / "run" / "fold_configs").mkdir(parents=True)
    with (tmp_path / "run" / "fold_configs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CrossValidationError, match="another process is still working on its folds"):
            start()
    assert commands.calls == []
    start()
    assert commands.calls == EVERY
