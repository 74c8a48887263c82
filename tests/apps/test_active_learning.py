# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which image comes next, and the scores that decide it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.monailabel.lib.errors import Conflict, NotFound, Unusable
from apps.monailabel.lib.local_store import LocalStore
from apps.monailabel.lib.scoring import EntropyScoring
from apps.monailabel.lib.strategies import SCORE, noted_entropy, strategies
from apps.monailabel.lib.versions import ModelVersions
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

ROOT = Path(__file__).resolve().parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles" / "rsna_cnn_lstm" / "configs" / "labels.json")
IMAGES = ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz"]
LABEL = {"groups": {"liver": "low"}}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in IMAGES:
        (folder / name).write_bytes(b"a volume")
    return LocalStore(folder, TABLE)


def note(store: LocalStore, **entropies: Any) -> None:
    for name, entropy in entropies.items():
        store.update_image_info(f"{name}.nii.gz", {"entropy": entropy})


def label(store: LocalStore, image: str, tmp_path: Path) -> None:
    (tmp_path / "label.json").write_text(json.dumps(LABEL))
    store.save_label(image, str(tmp_path / "label.json"), "final", {})


def next_sample(store: LocalStore, strategy: str) -> str | None:
    reply = strategies()[strategy]({"strategy": strategy}, store)
    return None if reply is None else reply["id"]


def test_the_most_uncertain_comes_first_and_unscored_ones_after_the_scored(store: LocalStore, tmp_path: Path) -> None:
    note(store, b=0.2, d=0.7)
    order = []
    while (image := next_sample(store, "uncertain")) is not None:
        order.append(image)
        label(store, image, tmp_path)
    assert order == ["d.nii.gz", "b.nii.gz", "a.nii.gz", "c.nii.gz"]


def test_the_reply_says_how_uncertain(store: LocalStore) -> None:
    note(store, c=0.25)
    reply = strategies()["uncertain"]({"strategy": "uncertain"}, store)
    assert reply == {"id": "c.nii.gz", "entropy": 0.25, "unlabelled": 4}
    assert strategies()["first"]({"strategy": "first"}, store) == {"id": "a.nii.gz", "entropy": None, "unlabelled": 4}


@pytest.mark.parametrize("value", ["high", None, True, [0.5], {}])
def test_what_is_no_entropy_counts_as_not_scored(store: LocalStore, value: Any) -> None:
    note(store, a=value, b=0.01)
    assert noted_entropy({"entropy": value}) is None
    assert next_sample(store, "uncertain") == "b.nii.gz"


@pytest.mark.parametrize("strategy", ["first", "random", "uncertain"])
def test_neither_labelled_nor_unreadable_images_are_served(store: LocalStore, tmp_path: Path, strategy: str) -> None:
    note(store, a=0.9, b=0.8, c=0.1, d=0.2)
    store.update_image_info("b.nii.gz", {"failed": "it is no CT"})
    label(store, "a.nii.gz", tmp_path)
    assert {next_sample(store, strategy) for _ in range(40)} <= {"c.nii.gz", "d.nii.gz"}
    assert "b.nii.gz" in store.list_images()
    for image in ("c.nii.gz", "d.nii.gz"):
        label(store, image, tmp_path)
    assert next_sample(store, strategy) is None


def test_random_takes_any_and_rather_those_that_waited_longest(store: LocalStore) -> None:
    assert set(Counter(next_sample(store, "random") for _ in range(200))) == set(IMAGES)
    now = time.time()
    for image in IMAGES[:3]:
        store.update_image_info(image, {"strategy": {"random": {"ts": now}}})
    assert Counter(next_sample(store, "random") for _ in range(50))["d.nii.gz"] == 50
    store.update_image_info("d.nii.gz", {"strategy": {"random": {"ts": now + 9e9}}})
    assert next_sample(store, "random") in IMAGES, "all were proposed this very second"
    store.update_image_info("d.nii.gz", {"strategy": "nonsense"})
    assert next_sample(store, "random") == "d.nii.gz"


class Classifier:
    """Predicts by the name of the image; what is in `faults` is raised instead."""

    def __init__(self) -> None:
        self.version = "shipped"
        self.values = dict(zip(IMAGES, (0.1, 0.4, 0.3, 0.2), strict=True))
        self.faults: dict[str, Exception] = {}
        self.calls: list[tuple[str, str]] = []

    def current(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.version, weights=Path(self.version))

    def predict(self, image: Path, weights: Path, *, name: str) -> SimpleNamespace:
        assert name == image.name
        self.calls.append((image.name, str(weights)))
        if image.name in self.faults:
            raise self.faults[image.name]
        value = self.values[image.name] + (0.5 if self.version != "shipped" else 0)
        return SimpleNamespace(probabilities={"liver": {"healthy": 1 - value, "low": value}})

    def scoring(self, settings: dict[str, Any] | None = None) -> EntropyScoring:
        return EntropyScoring(self.current, self.predict, lambda probabilities: probabilities["liver"]["low"], settings)


def test_scoring_notes_the_entropy_of_what_has_no_label(store: LocalStore, tmp_path: Path) -> None:
    classifier = Classifier()
    label(store, "b.nii.gz", tmp_path)
    done = classifier.scoring()({"method": "entropy"}, store)
    assert done == {"version": "shipped", "scored": 3, "already": 0, "left": 0, "failed": {}}
    assert [name for name, _ in classifier.calls] == ["a.nii.gz", "c.nii.gz", "d.nii.gz"]
    info = store.get_image_info("c.nii.gz")
    assert (info["entropy"], info["entropy_version"]) == (0.3, "shipped")
    assert info["probabilities"] == {"liver": {"healthy": 0.7, "low": 0.3}}
    assert noted_entropy(store.get_image_info("b.nii.gz")) is None
    assert next_sample(store, "uncertain") == "c.nii.gz"


def test_a_second_run_scores_only_what_is_new_or_of_another_version(store: LocalStore) -> None:
    classifier = Classifier()
    scoring = classifier.scoring()
    scoring({}, store)
    classifier.calls.clear()
    assert scoring({}, store) == {"version": "shipped", "scored": 0, "already": 4, "left": 0, "failed": {}}
    assert classifier.calls == []
    classifier.version = "0001"
    assert scoring({}, store)["scored"] == 4
    assert set(classifier.calls) == {(image, "0001") for image in IMAGES}
    info = store.get_image_info("a.nii.gz")
    assert (info["entropy"], info["entropy_version"]) == (0.6, "0001")


def test_scoring_goes_on_after_an_image_that_cannot_be_read(store: LocalStore) -> None:
    classifier = Classifier()
    scoring = classifier.scoring()
    scoring({}, store)
    classifier.version, classifier.faults = "0001", {"b.nii.gz": Unusable("b: two series in one folder")}
    done = scoring({}, store)
    assert (done["scored"], done["failed"]) == (3, {"b.nii.gz": "b: two series in one folder"})
    info = store.get_image_info("b.nii.gz")
    assert info["failed"] == "b: two series in one folder"
    assert not {"entropy", "entropy_version", "probabilities"} & set(info), "those of before are not its own any more"
    assert next_sample(store, "uncertain") == "c.nii.gz"
    assert scoring({}, store) == {"version": "0001", "scored": 0, "already": 3, "left": 0, "failed": done["failed"]}
    classifier.faults = {}
    assert scoring({}, store)["scored"] == 1, "repaired"
    assert "failed" not in store.get_image_info("b.nii.gz")
    assert next_sample(store, "uncertain") == "b.nii.gz"


def test_it_fails_if_no_image_can_be_read(store: LocalStore) -> None:
    classifier = Classifier()
    classifier.faults = {image: Unusable(f"{image}: it is no CT") for image in IMAGES}
    with pytest.raises(Unusable, match=r"none of 4 images could be scored; the first, a\.nii\.gz: a\.nii\.gz: it is"):
        classifier.scoring()({}, store)
    assert all("failed" in store.get_image_info(image) for image in IMAGES)


def test_what_is_not_the_images_own_fault_is_not_noted(store: LocalStore) -> None:
    classifier = Classifier()
    classifier.faults = {"a.nii.gz": NotFound("it is no longer there")}
    assert set(classifier.scoring()({}, store)["failed"]) == {"a.nii.gz"}
    assert "failed" not in store.get_image_info("a.nii.gz")


def test_what_cannot_be_noted_is_said_before_the_work(store: LocalStore) -> None:
    classifier = Classifier()
    (store.root / "labels").write_text("no folder")
    with pytest.raises(Conflict, match=r"note of image a\.nii\.gz cannot be stored"):
        classifier.scoring()({}, store)
    assert classifier.calls == []


def test_without_images_there_is_nothing_to_do(tmp_path: Path) -> None:
    done = Classifier().scoring()({}, LocalStore(tmp_path, TABLE))
    assert done == {"version": "shipped", "scored": 0, "already": 0, "left": 0, "failed": {}}


def test_other_weights_or_settings_under_the_same_name_score_again(store: LocalStore, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    classifier = Classifier()
    classifier.current = lambda: SimpleNamespace(name="shipped", weights=weights)
    assert classifier.scoring({"tta": ["x"]})({}, store)["scored"] == 4
    assert classifier.scoring({"tta": ["x"]})({}, store)["already"] == 4
    assert classifier.scoring({"tta": []})({}, store)["scored"] == 4, "other settings"
    assert classifier.scoring({"tta": []})({}, store)["already"] == 4
    weights.write_bytes(b"further weights")
    assert classifier.scoring({"tta": []})({}, store)["scored"] == 4, "another file of the same name"
    shutil.copyfile(weights, tmp_path / "copy")
    os.utime(weights, ns=(1, 1))
    assert classifier.scoring({"tta": []})({}, store)["scored"] == 4, "of the same size"


def test_scores_by_what_is_not_in_use_come_after_those_that_are(store: LocalStore) -> None:
    classifier = Classifier()
    classifier.scoring()({}, store)
    uncertain = strategies(classifier.current)["uncertain"]

    def first() -> str:
        return uncertain({"strategy": "uncertain"}, store)["id"]

    assert first() == "b.nii.gz"
    store.update_image_info("d.nii.gz", {**dict.fromkeys(SCORE), "failed": None})
    classifier.version = "0001"
    assert first() == "b.nii.gz", "better an old score than none"
    classifier.values["c.nii.gz"] = -0.4
    classifier.faults = {image: NotFound("not now") for image in ("a.nii.gz", "b.nii.gz", "d.nii.gz")}
    classifier.scoring()({}, store)
    assert store.get_image_info("c.nii.gz")["entropy"] < store.get_image_info("b.nii.gz")["entropy"]
    assert first() == "c.nii.gz"

    def none() -> None:
        raise Conflict("there are no weights yet")

    assert strategies(none)["uncertain"]({"strategy": "uncertain"}, store)["id"] == "b.nii.gz"


def test_a_run_tries_no_more_images_than_asked_for_and_new_ones_first(store: LocalStore) -> None:
    classifier = Classifier()
    classifier.faults = {image: Unusable("it is no CT") for image in ("a.nii.gz", "b.nii.gz")}
    scoring = classifier.scoring()
    with pytest.raises(Unusable, match="none of 2 images could be scored"):
        scoring({"max_images": 2}, store)
    assert [name for name, _ in classifier.calls] == ["a.nii.gz", "b.nii.gz"]
    classifier.calls.clear()
    assert scoring({"max_images": 1}, store) == {"version": "shipped", "scored": 1, "already": 0, "left": 3,
                                                 "failed": {}}  # fmt: skip
    assert scoring({"max_images": 9}, store)["left"] == 0
    assert [name for name, _ in classifier.calls] == ["c.nii.gz", "d.nii.gz", "a.nii.gz", "b.nii.gz"]


@pytest.mark.parametrize("number", [0, -1, "3", 1.5, True, [], "all"])
def test_a_number_of_images_that_is_none_is_refused(store: LocalStore, number: Any) -> None:
    classifier = Classifier()
    for call in (EntropyScoring.check, lambda request: classifier.scoring()(request, store)):
        with pytest.raises(Unusable, match="max_images: expected a whole number from 1"):
            call({"max_images": number})
    assert classifier.calls == []
    assert EntropyScoring.check({}) is EntropyScoring.check({"max_images": None}) is None


@pytest.mark.parametrize("error", [RuntimeError("CUDA error at /home/x"), OSError(28, "No space"), MemoryError(),
                                   Conflict("not enough memory now")])  # fmt: skip
def test_scoring_goes_on_after_what_is_no_fault_of_the_image(
    store: LocalStore, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = Classifier()
    classifier.faults = {"b.nii.gz": error}
    done = classifier.scoring()({}, store)
    assert (done["scored"], list(done["failed"])) == (3, ["b.nii.gz"])
    own = isinstance(error, Conflict)
    said = "not enough memory now" if own else f"failed with {type(error).__name__}; the server's log says why"
    assert done["failed"]["b.nii.gz"] == said
    assert "failed" not in store.get_image_info("b.nii.gz")
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (record.exc_info is None) == own, "the log has the stack trace"


def test_what_fails_image_after_image_ends_a_run(tmp_path: Path) -> None:
    names = [f"{number:02}.nii.gz" for number in range(30)]
    for name in names:
        (tmp_path / name).write_bytes(b"a volume")
    classifier = Classifier()
    classifier.values = dict.fromkeys(names, 0.5)
    classifier.faults = dict.fromkeys(names[5:], NotFound("the PACS is down"))
    with pytest.raises(NotFound, match="stopped after 10 images that failed one after the other: the PACS is down"):
        classifier.scoring()({}, LocalStore(tmp_path, TABLE))
    assert len(classifier.calls) == 15
    classifier.calls.clear()
    classifier.faults = dict.fromkeys(names[5:], Unusable("it is no CT"))
    assert len(classifier.scoring()({}, LocalStore(tmp_path, TABLE))["failed"]) == 25, "their own fault"


DATA = ["acrin_flt_breast_001.nii.gz", "cptac_pda_c3l_00189.nii.gz", "lidc_idri_0001.nii.gz"]
BROKEN = "broken.nii.gz"


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in DATA:
        shutil.copy(ROOT / "tests" / "data" / name, folder)
    (folder / BROKEN).write_bytes(b"no volume")
    return folder


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any], studies: Path) -> Any:
    return start_server(studies)


def score(server: Any) -> dict[str, Any]:
    reply = server.post("/scoring/entropy")
    assert (reply.status_code, reply.json()["status"]) == (200, "SUBMITTED"), reply.text
    return server.wait_for("scoring")


def notes(server: Any, image: str) -> dict[str, Any]:
    return server.get("/datastore/image/info", params={"image": image}).json()


def propose(server: Any, strategy: str) -> dict[str, Any]:
    reply = server.post(f"/activelearning/{strategy}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def put_label(server: Any, image: str) -> None:
    reply = server.put("/datastore/label", params={"image": image, "tag": "final"},
                       files={"label": ("label.json", json.dumps(LABEL))})  # fmt: skip
    assert reply.json() == {"image": image, "label": image}, reply.text


def add_version(server: Any, weights: Path) -> None:
    """A second version of the weights, as a training leaves it."""
    changed = {name: tensor * 2 if tensor.ndim > 1 else tensor for name, tensor in torch.load(weights).items()}
    run = server.app / "model" / "run"
    (run / "training").mkdir(parents=True)
    torch.save(changed, run / "training" / "model.pt")
    ModelVersions(server.app / "model" / "rsna_cnn_lstm" / "versions", weights).add(run, {"chosen": False})


@pytest.mark.slow
def test_the_server_scores_proposes_and_takes_labels(
    server: Any, start_server: Callable[..., Any], studies: Path, weights: Path
) -> None:
    assert propose(server, "uncertain")["entropy"] is None, "nothing is scored yet"
    state = score(server)
    assert state["status"] == "DONE", state
    first = {image: notes(server, image) for image in DATA}
    for image, noted in first.items():
        reply = server.post("/infer/rsna_cnn_lstm", params={"image": image}).json()
        assert (noted["entropy"], noted["entropy_version"]) == (reply["entropy"], "shipped")
        assert noted["probabilities"] == reply["injuries"]
    assert "failed" in notes(server, BROKEN)
    assert str(studies) not in notes(server, BROKEN)["failed"]

    by_entropy = sorted(DATA, key=lambda image: -first[image]["entropy"])
    chosen = propose(server, "uncertain")
    assert (chosen["id"], chosen["entropy"]) == (by_entropy[0], first[by_entropy[0]]["entropy"])
    assert propose(server, "first")["id"] == DATA[0]
    assert {propose(server, "random")["id"] for _ in range(30)} == set(DATA), "one that cannot be read is never served"
    assert server.post("/activelearning/best").status_code == 404
    assert server.post("/scoring/best").status_code == 404

    put_label(server, by_entropy[0])
    assert propose(server, "uncertain")["id"] == by_entropy[1]
    add_version(server, weights)
    assert server.put("/versions/rsna_cnn_lstm", params={"version": "0001"}).status_code == 200
    assert score(server)["status"] == "DONE"
    second = {image: notes(server, image) for image in DATA}
    assert {image: noted["entropy_version"] for image, noted in second.items()} == {
        by_entropy[0]: "shipped", by_entropy[1]: "0001", by_entropy[2]: "0001"}  # fmt: skip
    assert all(second[image]["entropy"] != first[image]["entropy"] for image in by_entropy[1:])
    left = sorted(by_entropy[1:], key=lambda image: -second[image]["entropy"])

    server.stop()
    again = start_server(studies, app=server.app)
    assert again.get("/info/").json()["datastore"] == {"total": 4, "completed": 1, "label_tags": {"final": 1}}
    for image in left:
        assert propose(again, "uncertain")["id"] == image
        put_label(again, image)
    assert [propose(again, strategy) for strategy in ("first", "random", "uncertain")] == [{}, {}, {}]
    state = score(again)
    assert state["status"] == "ERROR", "the only image without a label cannot be read"
    assert f"none of 1 images could be scored; the first, {BROKEN}" in state["details"][-1]
    assert not any("Traceback" in line or str(studies) in line for line in state["details"])


@pytest.mark.slow
def test_without_weights_scoring_says_what_to_do(start_server: Callable[..., Any], studies: Path) -> None:
    server = start_server(studies, shipped=None)
    state = score(server)
    assert state["status"] == "ERROR"
    assert "there are no weights yet" in state["details"][-1]
