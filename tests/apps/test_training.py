# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A real server trains: new versions beside the shipped weights, a way back, and failures that lose nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from demo.dataset import Options, write_dataset

MODEL, PRETRAINING = "rsna_cnn_lstm", "voco2d_pretrain"
PATIENTS, LABELLED = 8, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "rsna"
    write_dataset(folder, patients=PATIENTS, seed=7, options=Options(size=64, slices=16), workers=2, progress=False)
    return folder


@pytest.fixture(scope="module")
def truth(dataset: Path) -> dict[str, dict[str, str]]:
    """Patient -> class of each group, from `train.csv`."""
    classes = {}
    with (dataset / "train.csv").open() as file:
        for row in csv.DictReader(file):
            names = [name for name, value in row.items() if name not in ("patient_id", "any_injury") and float(value)]
            classes[row["patient_id"]] = dict(name.rsplit("_", 1) for name in names)
    return classes


class Training:
    """A server and what was known of it before the first training."""

    def __init__(self, server: object, weights: Path, truth: dict[str, dict[str, str]]) -> None:
        self.server, self.weights, self.truth = server, weights, truth
        self.digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        images = sorted(server.get("/datastore/?output=all").json()["objects"])
        patients = sorted({self.patient(image) for image in images})
        self.images = images
        self.labelled = [image for image in images if self.patient(image) in patients[:LABELLED]]
        self.unlabelled = [image for image in images if image not in self.labelled]

    @staticmethod
    def patient(image: str) -> str:
        return image.split("/")[-2]

    def label(self, images: list[str]) -> None:
        for image in images:
            label = json.dumps({"groups": self.truth[self.patient(image)], "comment": "as the generator drew it"})
            params = {"image": image, "tag": "final"}
            reply = self.server.put("/datastore/label", params=params, files={"label": ("label.json", label)})
            assert reply.status_code == 200, reply.text

    def train(self, model: str = MODEL, **params: object) -> dict[str, object]:
        reply = self.server.post(f"/train/{model}", json=params)
        assert reply.status_code == 200, reply.text
        return self.server.wait_for("train")

    def score(self) -> dict[str, tuple[float, str]]:
        """Entropy and version of each unlabelled image, after a scoring."""
        assert self.server.post("/scoring/entropy").status_code == 200
        assert self.server.wait_for("scoring")["status"] == "DONE"
        infos = [self.server.get("/datastore/image/info", params={"image": image}).json() for image in self.unlabelled]
        return {image: (info["entropy"], info["entropy_version"])
                for image, info in zip(self.unlabelled, infos, strict=True)}  # fmt: skip

    def infer(self) -> dict[str, object]:
        reply = self.server.post(f"/infer/{MODEL}", params={"image": self.unlabelled[0], "output": "json"})
        assert reply.status_code == 200, reply.text
        return {key: value for key, value in reply.json().items() if key in ("injuries", "version", "entropy")}

    def versions(self) -> list[dict[str, object]]:
        return self.server.get(f"/versions/{MODEL}").json()

    def used(self) -> str:
        return next(entry["name"] for entry in self.versions() if entry["chosen"])

    def choose(self, name: str) -> None:
        reply = self.server.put(f"/versions/{MODEL}", params={"version": name})
        assert reply.status_code == 200, reply.text

    def completed(self) -> int:
        return self.server.get("/datastore/").json()["completed"]

    def folder(self, version: str) -> Path:
        return self.server.app / "model" / MODEL / "versions" / version

    def processes(self) -> list[psutil.Process]:
        """Runs of a bundle that this server has started."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "monai.bundle" in words and str(self.server.app) in " ".join(words):
                found.append(process)
        return found


@pytest.fixture(scope="module")
def bare(
    start_server: Callable[..., object], dataset: Path, weights: Path, truth: dict[str, dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Training:  # fmt: skip
    """A server that begins without weights."""
    studies = tmp_path_factory.mktemp("studies")
    shutil.copytree(dataset / "train_images", studies / "train_images")
    return Training(start_server(studies, shipped=None), weights, truth)


@pytest.fixture(scope="module")
def pretrained(bare: Training) -> dict[str, object]:
    """A pretraining, and the first training from it: the first weights."""
    refused = bare.server.post(f"/infer/{MODEL}", params={"image": bare.unlabelled[0]})
    bare.label(bare.labelled[: len(bare.labelled) // 2])
    too_few = bare.server.post(f"/train/{MODEL}", params={"run_sync": True}, json={"max_epochs": 1})
    bare.label(bare.labelled)
    found = {"refused": refused, "too_few": too_few}
    for model in (PRETRAINING, MODEL):
        state = bare.train(model, max_epochs=1)
        assert state["status"] == "DONE", "\n".join(state["details"])
    newest = bare.server.get("/info/").json()["train_stats"][PRETRAINING]
    return {**found, "pretraining": newest, "versions": bare.versions(), "answer": bare.infer()}


@pytest.fixture(scope="module")
def training(bare: Training, pretrained: dict[str, object], start_server: Callable[..., object]) -> Training:
    """The same begun anew, with shipped weights, which are put in use."""
    pretrained["completed"] = bare.completed()
    bare.server.stop()
    bare.server = start_server(bare.server.studies, app=bare.server.app)
    pretrained["restarted"] = {"versions": bare.versions(), "answer": bare.infer(), "completed": bare.completed()}
    bare.choose("shipped")
    return bare


@pytest.fixture(scope="module")
def second(training: Training) -> dict[str, object]:
    """A training from the shipped weights and what it changed; the version that it made is in use."""
    before = {"score": training.score(), "answer": training.infer()}
    state = training.train(max_epochs=1, learning_rate=0.01, start="version")
    assert state["status"] == "DONE", "\n".join(state["details"])
    by_itself = training.used()
    training.choose("0002")
    return {"before": before, "used": by_itself, "after": {"score": training.score(), "answer": training.infer()}}


@pytest.mark.slow
def test_too_few_labels_are_said(pretrained: dict[str, object]) -> None:
    assert pretrained["too_few"].status_code == 409
    assert "training needs final labels of at least 5 patients, found" in pretrained["too_few"].json()["detail"]


@pytest.mark.slow
def test_pretraining_sees_every_image_and_the_next_training_starts_from_it(
    bare: Training, pretrained: dict[str, object]
) -> None:
    newest = pretrained["pretraining"]
    assert (newest["images"], newest["started_from"]) == (len(bare.images), "scratch")
    weights = bare.server.app / "model" / PRETRAINING / "runs" / newest["name"] / "training" / "model.pt"
    [first] = pretrained["versions"]
    assert first["started_from"] == f"the backbone of pretraining {newest['name']}"
    config = json.loads((bare.folder("0001") / "training" / "config.json").read_text())
    assert Path(config["pretrained_path"]).samefile(weights)
    assert "backbone tensors loaded" in (bare.folder("0001") / "training" / "log.txt").read_text()


@pytest.mark.slow
def test_without_shipped_weights_the_first_training_makes_them(pretrained: dict[str, object]) -> None:
    assert pretrained["refused"].status_code == 409
    assert "--conf weights" in pretrained["refused"].json()["detail"]
    [first] = pretrained["versions"]
    assert (first["name"], first["chosen"]) == ("0001", True)
    assert first["reason"].startswith("the first weights")
    assert pretrained["answer"]["version"] == "0001"


@pytest.mark.slow
def test_a_restart_keeps_labels_and_versions(training: Training, pretrained: dict[str, object]) -> None:
    again = pretrained["restarted"]
    assert again["completed"] == pretrained["completed"] == len(training.labelled)
    assert again["answer"] == pretrained["answer"]
    assert again["versions"][-1] == pretrained["versions"][-1]
    assert [entry["name"] for entry in again["versions"]] == ["shipped", "0001"]


@pytest.mark.slow
def test_a_training_adds_a_version_beside_the_shipped_one(training: Training, second: dict[str, object]) -> None:
    shipped, _, added = training.versions()
    assert (shipped["name"], added["name"]) == ("shipped", "0002")
    assert added["labels"] == LABELLED
    assert added["started_from"] == "version shipped"
    assert hashlib.sha256(training.weights.read_bytes()).hexdigest() == training.digest
    assert (training.folder("0002") / "training" / "model.pt").read_bytes() != training.weights.read_bytes()
    patients = json.loads((training.folder("0002") / "training" / "training_patients.json").read_text())
    assert len(patients) == LABELLED - 1, "one is held out"


@pytest.mark.slow
def test_the_better_version_was_used_by_itself(training: Training, second: dict[str, object]) -> None:
    added = json.loads((training.folder("0002") / "version.json").read_text())
    assert added["compared_with"]["name"] == "shipped"
    assert added["chosen"] is (added["score"] < added["compared_with"]["score"])
    assert second["used"] == ("0002" if added["chosen"] else "shipped")
    assert f"{added['score']:.4f}" in added["reason"]
    # the figure of the training's own last validation, of which lower is better
    metrics = json.loads((training.folder("0002") / "training" / "run.json").read_text())["metrics"]
    assert added["score"] == pytest.approx(-metrics["negative_score"])


@pytest.mark.slow
def test_scores_and_answers_change_with_the_version(training: Training, second: dict[str, object]) -> None:
    before, after = second["before"], second["after"]
    assert {version for _, version in before["score"].values()} == {"shipped"}
    assert {version for _, version in after["score"].values()} == {"0002"}
    assert all(before["score"][image][0] != after["score"][image][0] for image in training.unlabelled)
    assert before["answer"]["version"] == "shipped"
    assert after["answer"]["version"] == "0002"
    assert after["answer"]["injuries"] != before["answer"]["injuries"]


@pytest.mark.slow
def test_the_way_back_gives_the_old_answers_to_the_last_digit(training: Training, second: dict[str, object]) -> None:
    training.choose("shipped")
    assert training.infer() == second["before"]["answer"]
    training.choose("0002")
    assert training.infer() == second["after"]["answer"]
    reply = training.server.put(f"/versions/{MODEL}", params={"version": "../../0002"})
    assert reply.status_code == 404
    assert "expected one of shipped, 0001, 0002" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_epoch": 1}, "unknown parameter 'max_epoch': did you mean max_epochs"),
        ({"pretrained_path": "/etc/passwd"}, "'pretrained_path' is the server's"),
        ({"output_root": "/tmp"}, "'output_root' is the server's"),
        ({"device": "$import os"}, "device: expected a plain word"),
        ({"volume_size": [1, 1, 1]}, "'volume_size' belongs to the network"),
        ({"start": "/etc/passwd"}, "start: expected one of auto, version"),
    ],
)
def test_a_request_that_is_not_allowed_is_refused_at_once(
    bare: Training, params: dict[str, object], message: str
) -> None:
    reply = bare.server.post(f"/train/{MODEL}", json=params)
    assert reply.status_code == 422, reply.text
    assert message in reply.json()["detail"]


@pytest.mark.slow
def test_a_failing_training_says_why_and_loses_nothing(training: Training, second: dict[str, object]) -> None:
    before = training.versions(), training.completed()
    state = training.train(max_epochs=1, device="cuda:77")
    assert state["status"] == "ERROR"
    assert "error: training failed: " in state["details"][-1]
    assert "cuda:77" in "\n".join(state["details"])
    assert "Traceback" not in "\n".join(state["details"])
    assert (training.versions(), training.completed()) == before


@pytest.mark.slow
def test_one_training_at_a_time_and_an_end_to_all_of_it(training: Training, second: dict[str, object]) -> None:
    before = training.versions()
    assert training.server.post(f"/train/{MODEL}", json={"max_epochs": 10_000}).status_code == 200
    end = time.time() + 120
    while not training.processes() and time.time() < end:
        time.sleep(0.2)
    assert training.processes()
    assert training.server.post(f"/train/{PRETRAINING}").status_code == 429
    # neither does one that would not wait for its turn
    waits = {"run_sync": True, "enqueue": True}
    together = training.server.post(f"/train/{MODEL}", params=waits, json={"max_epochs": 1})
    assert together.status_code == 409
    assert "another training of rsna_cnn_lstm is running" in together.json()["detail"]
    assert training.server.request("DELETE", "/train/").json()["status"] == "STOPPED"
    _, alive = psutil.wait_procs(training.processes(), timeout=10)
    assert not alive
    assert training.versions() == before
