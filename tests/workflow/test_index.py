# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A tree listed with an index is what a fresh walk finds, and folders that did not change are not listed."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import workflow.index
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.datalist import find_series, unlabelled_datalist
from workflow.index import index_file, walk

DICOM = b"\x00" * 128 + b"DICM" + b"\x00" * 8
FILES = ("1.dcm", "IM1", "README", "a.nii", "b.nii.gz", "1.2.840", "t.csv", "ä ö.DCM")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "the trée"
    for name in ("train_images/1/10", "train_images/1/11", "train_images/2/20", "segmentations", "train_images/3"):
        (root / name).mkdir(parents=True)
    for name in ("train_images/1/10/1.dcm", "train_images/1/11/x.dcm", "segmentations/10.nii", "own.nii.gz"):
        (root / name).touch()
    (root / "train_images/2/20/IM1").write_bytes(DICOM)
    return root


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that were listed, in a world where no folder changed just now."""
    names: list[str] = []
    original = workflow.index._list
    monkeypatch.setattr(workflow.index, "RACY_NS", -(2**62))
    monkeypatch.setattr(workflow.index, "_list", lambda path, *args: names.append(path) or original(path, *args))
    return names


def test_only_what_changed_is_listed_again(tree: Path, tmp_path: Path, listed: list[str]) -> None:
    first = walk(tree, tmp_path / "cache")
    assert [folder.path for folder in first] == [
        "", "segmentations", "train_images", "train_images/1", "train_images/1/10", "train_images/1/11",
        "train_images/2", "train_images/2/20", "train_images/3",
    ]  # fmt: skip
    assert [folder.path for folder in first if folder.dicom] == [
        "train_images/1/10", "train_images/1/11", "train_images/2/20",
    ]  # fmt: skip
    assert len(listed) == 9
    listed.clear()
    assert walk(tree, tmp_path / "cache") == first == walk(tree)
    assert len(listed) == 9  # the walk without an index
    listed.clear()
    time.sleep(0.05)
    (tree / "train_images/3/30").mkdir()
    found = walk(tree, tmp_path / "cache")
    assert sorted(Path(path).name for path in listed) == ["3", "30"]
    assert len(found) == 10


def test_files_are_opened_until_one_is_dicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = workflow.index.is_dicom
    monkeypatch.setattr(workflow.index, "is_dicom", lambda path: opened.append(path.name) or original(path))
    contents = {"a": {"1.IMA": DICOM, "2.IMA": DICOM}, "b": {"1.ima": b"", "x.dcm": b""}, "c": {"n.txt": DICOM}}
    for folder, files in contents.items():
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
    assert [folder.dicom for folder in walk(tmp_path)] == [False, True, True, False]
    assert len(opened) == 1  # one of a/; b/ has a name that says it, and a text is none


def test_a_folder_that_changed_just_now_is_not_trusted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within one tick of the file system leaves the folder's time as it was."""
    monkeypatch.setattr(workflow.index, "RACY_NS", 2**62)  # however long this test takes
    walk(tree, tmp_path)
    before = os.stat(tree / "train_images/3")
    (tree / "train_images/3/late.dcm").touch()
    os.utime(tree / "train_images/3", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [folder.dicom for folder in walk(tree, tmp_path) if folder.path == "train_images/3"] == [True]


@pytest.mark.parametrize("damage", ["truncated", "empty", "binary", "flipped", "version", "list", "short"])
def test_a_damaged_index_is_made_again(
    tree: Path, tmp_path: Path, listed: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = walk(tree, tmp_path)
    store = index_file(tree, tmp_path)
    text = store.read_text()
    content = json.loads(text)
    store.write_bytes(
        {
            "truncated": text[: len(text) // 2].encode(),
            "empty": b"",
            "binary": b"\xff\xfe\x00",
            "flipped": text.replace("train_images/2/20", "train_images/2/21").encode(),
            "version": json.dumps({**content, "version": 0}).encode(),
            "list": b"[1]",
            "short": json.dumps({**content, "folders": [[""]], "checksum": workflow.index._checksum([[""]])}).encode(),
        }[damage]
    )
    listed.clear()
    with caplog.at_level(logging.WARNING):
        assert walk(tree, tmp_path) == first
    assert "cannot be used" in caplog.text
    assert len(listed) == 9
    assert store.read_text() == text


def test_an_index_that_cannot_be_written_costs_time_only(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert walk(tree, tmp_path / "file") == walk(tree)
    assert "cannot be written" in caplog.text


def test_series_are_those_of_a_walk_without_index(tree: Path, tmp_path: Path) -> None:
    expected = find_series(tree)
    assert len(expected) == 4  # the mask beside the images is none
    for _ in range(2):
        assert find_series(tree, cache_dir=tmp_path) == expected
        assert len(unlabelled_datalist(str(tree), cache_dir=str(tmp_path), val_fraction=0)) == 4
    assert index_file(tree, tmp_path).is_file()


def change(tree: Path, rng: random.Random) -> None:
    """Add, remove or rename a file or folder somewhere in the tree."""
    folders = [Path(path) for path, _, _ in os.walk(tree)]
    folder = rng.choice(folders)
    entries = sorted(folder.iterdir())
    action = rng.choice(["file", "folder", "remove", "rename", "move"])
    if action == "file":
        (folder / rng.choice(FILES)).write_bytes(rng.choice([b"", DICOM]))
    elif action == "folder":
        (folder / f"f{rng.randrange(5)}").mkdir(exist_ok=True)
    elif entries:
        entry = rng.choice(entries)
        if action == "remove":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        else:
            target = folder if action == "rename" else rng.choice(folders)
            if entry not in (target, *target.parents) and target.is_dir():
                name = f"r{rng.randrange(100)}{entry.suffix}"
                if not (target / name).exists():
                    entry.rename(target / name)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_whatever_changes_the_index_is_a_fresh_walk(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    top = tmp_path_factory.mktemp("changes")
    tree = top / "tree"
    (tree / "a/b").mkdir(parents=True)
    listed = []
    original = workflow.index._list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow.index, "RACY_NS", -(2**62))  # trust every time, and wait longer than a tick instead
        patch.setattr(workflow.index, "_list", lambda path, *args: listed.append(path) or original(path, *args))
        for _ in range(8):
            for _ in range(rng.randrange(4)):
                replaced = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
                change(tree, rng)
                for path, content in replaced.items():  # overwriting in place is what an index cannot see
                    if path.is_file() and path.read_bytes() != content:
                        path.write_bytes(content)
            time.sleep(0.03)
            indexed = walk(tree, top / "cache")
            with_index, fresh = len(listed), walk(tree)
            assert indexed == fresh
            assert with_index <= len(listed) - with_index or len(fresh) < 3
            listed.clear()
