# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The training tasks over a run that only leaves files: what they ask of the bundles, and what they make of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.monailabel.lib.bundles import Setup, use_bundle

ROOT = Path(__file__).resolve().parents[2]
use_bundle(ROOT / "bundles" / "rsna_cnn_lstm")  # as the app does before it imports the modules below

from apps.monailabel.lib import train_tasks  # noqa: E402
from apps.monailabel.lib.bundle_run import RunFailed  # noqa: E402
from apps.monailabel.lib.errors import AppError, Conflict  # noqa: E402
from apps.monailabel.lib.train_tasks import ClassifierTrainTask, PretrainTask  # noqa: E402
from apps.monailabel.lib.versions import ModelVersions  # noqa: E402


class Store:
    """Ten labelled patients with a file each."""

    def __init__(self, folder: Path) -> None:
        self.images_root = self.root = folder
        (folder / "labels").mkdir(parents=True)
        for i in range(10):
            (folder / f"p{i}.nii.gz").touch()
            (folder / "labels" / f"p{i}.json").write_text(json.dumps({"groups": {"liver": "low" if i % 2 else "high"}}))

    def items(self) -> list[dict[str, str]]:
        names = [f"p{i}" for i in range(10)]
        return [{"id": name, "image": str(self.root / f"{name}.nii.gz"), "patient_id": name, "series_id": name}
                for name in names]  # fmt: skip

    def get_image_uri(self, image_id: str) -> str:
        return str(self.root / f"{image_id}.nii.gz")

    def datalist(self) -> list[dict[str, str]]:
        return [{**item, "label": str(self.root / "labels" / f"{item['id']}.json")} for item in self.items()]


class Tasks:
    """Both tasks; `runs` are the overrides of what they ran, `scores` what evaluations find, one after the other."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, settings: dict[str, object] | None = None) -> None:
        shipped = folder / "shipped" / "model.pt"
        shipped.parent.mkdir()
        shipped.write_bytes(b"shipped")
        setup = Setup(app_dir=folder, bundles=ROOT / "bundles", models=("rsna_cnn_lstm", "voco2d_pretrain"),
                      settings=settings or {}, weights=shipped, output_root=folder / "out", device="cpu",
                      upload_limit=1)  # fmt: skip
        self.versions = ModelVersions(folder / "out" / "rsna_cnn_lstm" / "versions", shipped)
        self.classifier, self.pretraining = (
            ClassifierTrainTask(setup, self.versions),
            PretrainTask(setup, self.versions),
        )
        self.store = Store(folder / "studies")
        self.runs: list[dict[str, object]] = []
        self.scores: list[float | Exception | None] = []
        self.patients = 2  # held out
        self.during: Callable[[], object] | None = None  # what happens while a training runs
        patch.setattr("apps.monailabel.lib.bundle_task.run_bundle", self.run)

    def run(self, bundle: Path, configs: tuple[str, ...], overrides: dict[str, object], folder: Path, name: str,
            hide: object) -> Path:  # fmt: skip
        self.runs.append({"name": name, "configs": configs, **overrides})
        run = folder / name
        run.mkdir()
        (run / "run.json").write_text('{"result": "completed"}')
        if configs == ("train.json",):
            if self.during is not None:
                self.during()
            (run / "model.pt").write_bytes(b"trained")
            (run / "checkpoints").mkdir()
            return run
        score = self.scores.pop(0) if self.scores else 1.0
        if isinstance(score, Exception):
            raise score
        (run / "metrics.json").write_text(json.dumps({"score": {"value": score}, "patients": self.patients}))
        return run

    def train(self, **request: object) -> dict[str, object]:
        self.runs.clear()
        return self.classifier({"model": "rsna_cnn_lstm", **request}, self.store)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    return Tasks(tmp_path, monkeypatch)


def test_a_better_version_is_used_an_equal_one_is_not(tasks: Tasks) -> None:
    tasks.scores = [0.5, 0.6]
    assert tasks.train()["chosen"] is True
    assert tasks.versions.current().name == "0001"
    tasks.scores = [0.5, 0.5]
    assert tasks.train()["chosen"] is False
    assert tasks.versions.current().name == "0001"
    assert [entry["name"] for entry in tasks.versions.list()] == ["shipped", "0001", "0002"]
    assert tasks.versions.shipped.read_bytes() == b"shipped"
    assert not list(tasks.classifier.folder.glob("**/checkpoints"))


def test_both_are_scored_on_the_same_patients(tasks: Tasks) -> None:
    tasks.train(batch_size=1)
    training, new, old = tasks.runs
    assert [run["name"] for run in tasks.runs] == ["training", "evaluation", "evaluation_of_current"]
    assert new["configs"] == old["configs"] == ("train.json", "evaluate.json")
    for key in ("datalist", "folds_file", "fold", "dataset_dir", "batch_size", "device"):
        assert training[key] == new[key] == old[key]
    assert (new["weights"], old["weights"]) == (str(Path(training["datalist"]).parent / "training" / "model.pt"),
                                                str(tasks.versions.shipped))  # fmt: skip
    assert training["keep_best"] is False


def test_where_a_training_starts(tasks: Tasks) -> None:
    """The loader of the bundle takes the whole network from a version, and the backbone from a pretraining."""
    tasks.scores = [0.5, 0.6]
    assert tasks.train()["started_from"] == "version shipped"
    assert tasks.runs[0]["pretrained_path"] == str(tasks.versions.shipped)
    assert tasks.runs[0]["train#handlers#0#module"] == "@network_def"
    handler = tasks.classifier._train["train"]["handlers"][0]
    assert handler["_target_"] == "workflow.weights.WeightsLoader"

    assert tasks.train()["started_from"] == "version 0001"
    assert tasks.train(start="scratch")["started_from"] == "scratch"
    assert tasks.runs[0]["pretrained_path"] is None
    assert tasks.train(start="backbone")["started_from"] == "the backbone of version 0001"
    assert "train#handlers#0#module" not in tasks.runs[0]
    with pytest.raises(Conflict, match="no complete pretraining yet"):
        tasks.train(start="pretraining")

    made = tasks.pretraining({"model": "voco2d_pretrain"}, tasks.store)
    assert made["images"] == 10
    assert tasks.train()["started_from"] == f"the backbone of pretraining {made['name']}"
    tasks.scores = [0.1, 0.6]
    assert tasks.train()["chosen"] is True
    assert tasks.train()["started_from"].startswith("version ")
    assert tasks.train(start="pretraining")["started_from"] == f"the backbone of pretraining {made['name']}"


def test_pretraining_leaves_the_patients_out_who_compare_versions(tasks: Tasks) -> None:
    tasks.pretraining({}, tasks.store)
    assert tasks.runs[0]["folds_file"] is None, "there are no folds yet"
    tasks.train()
    tasks.runs.clear()
    tasks.pretraining({}, tasks.store)
    assert Path(tasks.runs[0]["folds_file"]).read_text() == (tasks.classifier.folder / "folds.csv").read_text()
    assert len(json.loads(Path(tasks.runs[0]["datalist"]).read_text())["training"]) == 10


def test_an_unfinished_pretraining_is_not_started_from(tasks: Tasks) -> None:
    made = tasks.pretraining({}, tasks.store)
    run = tasks.pretraining.folder / "runs" / made["name"]
    (run / "training" / "run.json").write_text('{"result": "started"}')
    assert tasks.train()["started_from"] == "version shipped"


def test_a_version_in_use_that_saw_the_patients_is_noted(tasks: Tasks) -> None:
    from workflow.privacy import pseudonym

    names = [pseudonym(f"p{i}") for i in range(10)]
    (tasks.versions.shipped.parent / "training_patients.json").write_text(json.dumps(names))
    tasks.scores = [0.7, 0.6]
    assert "version shipped was trained on some of them, which flatters it" in tasks.train()["reason"]
    assert [run.get("allow_seen_patients") for run in tasks.runs] == [None, None, True]


def test_a_version_in_use_that_cannot_be_scored_stays(tasks: Tasks) -> None:
    tasks.scores = [0.5, RunFailed("evaluation_of_current failed: the window was another")]
    made = tasks.train()
    assert made["chosen"] is False
    assert "version shipped could not be scored; evaluation_of_current failed: the window was another" in made["reason"]
    assert tasks.versions.current().name == "shipped"


def test_a_new_version_that_cannot_be_scored_is_kept_and_not_used(tasks: Tasks) -> None:
    tasks.scores = [RunFailed("evaluation failed: no room")]
    with pytest.raises(RunFailed, match="version 0001 is trained and kept, but not used: evaluation failed: no room"):
        tasks.train()
    assert tasks.versions.current().name == "shipped"
    assert tasks.versions.list()[1]["reason"] == "not chosen: it could not be scored: evaluation failed: no room"
    assert tasks.versions.choose("0001").weights.read_bytes() == b"trained"


def test_without_weights_the_first_version_is_used(tasks: Tasks) -> None:
    tasks.versions.shipped.unlink()
    tasks.scores = [9.0]
    made = tasks.train()
    assert (made["chosen"], made["started_from"], made["compared_with"]) == (True, "scratch", None)
    assert len(tasks.runs) == 2


def test_an_epoch_chosen_on_the_same_patients_is_noted(tasks: Tasks) -> None:
    assert "its epoch was chosen on the same patients" in tasks.train(keep_best=True)["reason"]


def test_a_training_that_failed_leaves_what_helps_to_see_why(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Path:
        tasks.run(*arguments)
        raise RunFailed("training failed: disk full")

    monkeypatch.setattr("apps.monailabel.lib.bundle_task.run_bundle", fails)
    for _ in range(2):  # of the same second: no folder is used twice
        with pytest.raises(RunFailed, match="disk full"):
            tasks.train()
    runs = list((tasks.classifier.folder / "runs").iterdir())
    assert len(runs) == 2
    assert len(list(tasks.classifier.folder.glob("runs/*/training/checkpoints"))) == 1, "of the last alone"
    assert [entry["name"] for entry in tasks.versions.list()] == ["shipped"]


def test_a_full_disk_is_one_sentence(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/out")

    monkeypatch.setattr(train_tasks, "write_datalist", full)
    with pytest.raises(AppError, match=r"^the training's files cannot be written or read: No space left on device$"):
        tasks.train()


def test_a_damaged_choice_is_said_before_the_training(tasks: Tasks) -> None:
    tasks.train()
    (tasks.versions.folder / "current.json").write_text("{")
    with pytest.raises(Conflict, match=r"current.json .* cannot be read"):
        tasks.train()
    assert not tasks.runs
    assert "cannot be read" in tasks.classifier.stats()["error"]


def test_weights_that_are_gone_are_said_before_the_training(tasks: Tasks) -> None:
    """Not taken for "none yet": the new ones would be chosen as the first, without a comparison."""
    tasks.scores = [0.5, 0.6]
    tasks.train()
    tasks.versions.current().weights.unlink()
    for task in (tasks.classifier, tasks.pretraining):
        tasks.runs.clear()
        with pytest.raises(Conflict, match=r"weights of version 0001, .* are gone: put them back, or choose another"):
            task({}, tasks.store)
        assert not tasks.runs
    tasks.versions.choose("shipped")
    tasks.pretraining({}, tasks.store)
    assert tasks.train()["compared_with"]["name"] == "shipped"


def test_what_is_chosen_by_hand_while_a_training_runs_stays(tasks: Tasks) -> None:
    tasks.scores = [0.5, 0.6]
    tasks.train()
    tasks.scores = [0.1, 0.5]
    tasks.during = lambda: tasks.versions.choose("shipped")
    made = tasks.train()
    assert (made["version"], made["chosen"]) == ("0002", False)
    assert made["reason"].startswith("not chosen: the version in use changed meanwhile; better: score 0.1000 on 2")
    assert tasks.versions.current().name == "shipped"


def test_a_single_patient_held_out_is_noted(tasks: Tasks) -> None:
    tasks.patients = 1
    assert "a single patient is held out" in tasks.train()["reason"]
    tasks.patients = 2
    assert "a single patient is held out" not in tasks.train()["reason"]


def test_the_settings_file_is_below_the_request_and_above_the_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rsna_cnn_lstm": {"train": {"batch_size": 7, "learning_rate": 0.5, "keep_best": True},
                                  "evaluate": {"report": True}}}  # fmt: skip
    tasks = Tasks(tmp_path, monkeypatch, settings)
    tasks.train(batch_size=3)
    training, evaluation, _ = tasks.runs
    assert [training[key] for key in ("batch_size", "learning_rate", "keep_best", "device")] == [3, 0.5, True, "cpu"]
    assert (evaluation["report"], evaluation["batch_size"]) == (True, 3)
    shown = tasks.classifier.config()
    assert (shown["batch_size"], shown["device"], shown["start"][0]) == (7, "cpu", "auto")
    assert tasks.classifier.check(shown)["batch_size"] == 7, "a client may send back what it was shown"
