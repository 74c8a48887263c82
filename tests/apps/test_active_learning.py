# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which image comes next, and the scores that decide it."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apps.monailabel.lib.errors import Conflict, NotFound, Unusable
from apps.monailabel.lib.local_store import LocalStore
from apps.monailabel.lib.scoring import EntropyScoring
from apps.monailabel.lib.strategies import noted_entropy, strategies
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

    def scoring(self) -> EntropyScoring:
        return EntropyScoring(self.current, self.predict, lambda probabilities: probabilities["liver"]["low"])


def test_scoring_notes_the_entropy_of_what_has_no_label(store: LocalStore, tmp_path: Path) -> None:
    classifier = Classifier()
    label(store, "b.nii.gz", tmp_path)
    done = classifier.scoring()({"method": "entropy"}, store)
    assert done == {"version": "shipped", "scored": 3, "already": 0, "failed": {}}
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
    assert scoring({}, store) == {"version": "shipped", "scored": 0, "already": 4, "failed": {}}
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
    assert scoring({}, store) == {"version": "0001", "scored": 0, "already": 3, "failed": done["failed"]}
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
    classifier.version, classifier.faults = "0001", {"b.nii.gz": Conflict("there are no weights")}
    classifier.calls.clear()
    with pytest.raises(Conflict, match="no weights"):
        classifier.scoring()({}, store)
    assert [name for name, _ in classifier.calls] == ["a.nii.gz", "b.nii.gz"], "it would be so for all the others"


def test_without_images_there_is_nothing_to_do(tmp_path: Path) -> None:
    done = Classifier().scoring()({}, LocalStore(tmp_path, TABLE))
    assert done == {"version": "shipped", "scored": 0, "already": 0, "failed": {}}
