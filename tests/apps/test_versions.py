# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Versions of a model: a new one beside the shipped weights, chosen or not, and the way back."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apps.monailabel.lib.errors import Conflict, NotFound
from apps.monailabel.lib.versions import ModelVersions


@pytest.fixture
def versions(tmp_path: Path) -> ModelVersions:
    shipped = tmp_path / "bundle" / "model.pt"
    shipped.parent.mkdir()
    shipped.write_bytes(b"shipped")
    return ModelVersions(tmp_path / "out" / "versions", shipped)


BETTER = {"chosen": True, "reason": "better", "compared_with": {"name": "shipped", "score": 2.0}}


def a_run(folder: Path, content: bytes = b"trained") -> Path:
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "model.pt").write_bytes(content)
    return folder


def test_shipped_weights_are_the_first_version(versions: ModelVersions) -> None:
    assert (versions.current().name, versions.current().weights.read_bytes()) == ("shipped", b"shipped")
    [only] = versions.list()
    assert only["name"] == "shipped"
    assert only["chosen"] is True
    assert not versions.folder.exists(), "looking writes nothing"


@pytest.mark.parametrize("shipped", ["absent.pt", None])
def test_without_any_weights_it_is_said_what_to_do(tmp_path: Path, shipped: str | None) -> None:
    none = ModelVersions(tmp_path / "versions", tmp_path / shipped if shipped else None)
    with pytest.raises(Conflict, match="--conf weights") as raised:
        none.current()
    assert str(tmp_path) not in str(raised.value)
    assert none.list() == []
    assert none.add(a_run(tmp_path / "run"), {"chosen": True, "reason": "the first"}).name == "0001"
    assert none.current().name == "0001"


def test_a_chosen_version_is_used_and_there_is_a_way_back(versions: ModelVersions, tmp_path: Path) -> None:
    added = versions.add(a_run(tmp_path / "out" / "run"), {**BETTER, "score": 1.0, "labels": 9})
    assert added == versions.current()
    assert added.weights.read_bytes() == b"trained"
    assert not (tmp_path / "out" / "run").exists()
    assert versions.choose("shipped").weights == versions.shipped
    shipped, trained = versions.list()
    assert (shipped["chosen"], shipped["reason"]) == (True, "chosen by hand")
    assert (trained["chosen"], trained["reason"], trained["score"], trained["labels"]) == (False, "better", 1.0, 9)
    assert trained["compared_with"] == {"name": "shipped", "score": 2.0}
    assert trained["created"]
    assert versions.shipped.read_bytes() == b"shipped"


def test_a_version_that_is_not_chosen_is_kept(versions: ModelVersions, tmp_path: Path) -> None:
    added = versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False, "reason": "worse"})
    assert added.name == "0001"
    assert versions.current().name == "shipped"
    assert versions.choose("0001").name == versions.current().name == "0001"


@pytest.mark.parametrize("name", ["0002", "", "..", "../versions/0001", "1", "SHIPPED", "0001/", "٠٠٠١"])
def test_an_unknown_version_is_not_found(versions: ModelVersions, tmp_path: Path, name: str) -> None:
    versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False})
    with pytest.raises(NotFound, match="expected one of shipped, 0001"):
        versions.choose(name)
    assert versions.current().name == "shipped"


def test_another_object_and_so_another_process_sees_the_same(versions: ModelVersions, tmp_path: Path) -> None:
    other = ModelVersions(versions.folder, versions.shipped)
    versions.add(a_run(tmp_path / "out" / "run"), BETTER)
    assert other.current().name == "0001"
    other.choose("shipped")
    assert versions.current().name == "shipped"


def test_numbers_are_never_used_twice(versions: ModelVersions, tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "out" / f"run{i}", b"%d" % i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda run: versions.add(run, {"chosen": False}).name, runs))
    assert sorted(names) == [f"{i:04d}" for i in range(1, 9)]
    assert [entry["name"] for entry in versions.list()] == ["shipped", *sorted(names)]


def test_a_training_without_weights_is_no_version(versions: ModelVersions, tmp_path: Path) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)
    with pytest.raises(Conflict, match="left no weights"):
        versions.add(tmp_path / "out" / "run", {"chosen": True})
    assert versions.current().name == "shipped"


def test_chosen_weights_that_are_gone_are_said(versions: ModelVersions, tmp_path: Path) -> None:
    added = versions.add(a_run(tmp_path / "out" / "run"), BETTER)
    added.weights.unlink()
    with pytest.raises(Conflict, match=r"weights of version 0001, .* are gone: .* choose another of shipped"):
        versions.current()
    assert versions.choose("shipped") == versions.current()


def test_a_damaged_record_is_said_without_a_path(versions: ModelVersions, tmp_path: Path) -> None:
    versions.add(a_run(tmp_path / "out" / "run"), BETTER)
    (versions.folder / "current.json").write_text("[{")
    with pytest.raises(Conflict, match=r"versions/current.json .* cannot be read") as raised:
        versions.current()
    assert str(tmp_path) not in str(raised.value)


def test_a_version_whose_record_is_damaged_can_be_used(versions: ModelVersions, tmp_path: Path) -> None:
    added = versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False, "reason": "worse"})
    (versions.folder / "0001" / "version.json").write_text("{")
    assert "0001/version.json of the versions cannot be read" in versions.list()[1]["reason"]
    assert versions.choose("0001") == added


def test_the_number_of_a_version_that_was_used_and_removed_is_not_given_again(
    versions: ModelVersions, tmp_path: Path
) -> None:
    versions.add(a_run(tmp_path / "out" / "run"), BETTER)
    versions.choose("shipped")
    shutil.rmtree(versions.folder / "0001")
    assert versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False}).name == "0002"


def test_what_was_chosen_while_a_training_ran_stays(versions: ModelVersions, tmp_path: Path) -> None:
    versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False, "reason": "worse"})
    versions.choose("0001")
    added = versions.add(a_run(tmp_path / "out" / "run"), BETTER)
    assert versions.current().name == "0001"
    recorded = versions.record(added.name)
    assert recorded["chosen"] is False
    assert recorded["reason"] == "not chosen: the version in use changed meanwhile; better"
    assert versions.list()[2]["reason"] == recorded["reason"]
    again = {**BETTER, "compared_with": {"name": "0001", "score": 2.0}}
    assert versions.add(a_run(tmp_path / "out" / "run"), again) == versions.current()


def test_first_weights_do_not_replace_those_that_came_meanwhile(tmp_path: Path) -> None:
    versions = ModelVersions(tmp_path / "versions", tmp_path / "model.pt")
    assert versions.in_use() is None
    versions.shipped.write_bytes(b"shipped")
    versions.add(a_run(tmp_path / "run"), {"chosen": True, "reason": "the first weights", "compared_with": None})
    assert versions.current().name == "shipped"


def test_weights_that_are_gone_are_not_none_at_all(versions: ModelVersions, tmp_path: Path) -> None:
    versions.add(a_run(tmp_path / "out" / "run"), {"chosen": False})
    versions.shipped.unlink()
    with pytest.raises(Conflict, match=r"the weights that were shipped are gone: .* choose another of 0001"):
        versions.in_use()
    versions.choose("0001")
    assert versions.in_use().name == "0001"
    shutil.rmtree(versions.folder / "0001")
    assert versions.in_use() is None
