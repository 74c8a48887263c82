# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Preparation ahead: goes on past what fails, reports, may run twice at once, and is not done again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import workflow.cache
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from torch.utils.data import DataLoader
from workflow.dataset import SlabDataset, collate_plain
from workflow.prepare import Preparation

SERIES = 6


class Read(MapTransform):
    """A folder of text files with a number each -> a volume of them."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(keys="image")
        self.seconds = seconds

    def __call__(self, data: dict) -> dict:
        values = [int(path.read_text()) for path in sorted(Path(data["image"]).iterdir())]
        time.sleep(self.seconds)
        volume = torch.tensor(values, dtype=torch.uint8).expand(1, 16, 16, len(values)).clone()
        return {**data, "image": MetaTensor(volume, affine=torch.eye(4))}


def make_series(top: Path) -> list[dict]:
    for i in range(SERIES):
        (top / str(i)).mkdir(parents=True)
        for k in range(3):
            (top / str(i) / f"{k}.txt").write_text(str(10 * i + k))
    return [{"image": str(top / str(i)), "series_id": str(i)} for i in range(SERIES)]


@pytest.fixture
def data(tmp_path: Path) -> list[dict]:
    return make_series(tmp_path / "series")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_counts_what_was_done(data, tmp_path, workers, caplog):
    (Path(data[2]["image"]) / "0.txt").write_text("no number")
    (Path(data[4]["image"]) / "0.txt").write_text("none either")

    def run() -> dict:
        dataset = SlabDataset(data, Read(), cache_dir=str(tmp_path / "cache"), num_workers=workers)
        preparation = Preparation(dataset)
        preparation.run(tmp_path / "out")
        assert [path for path, _ in preparation.failed] == [data[2]["image"], data[4]["image"]]
        assert "no number" in preparation.failed[0][1]
        return json.loads((tmp_path / "out" / "prepare.json").read_text())

    with caplog.at_level(logging.INFO):
        first = run()
    assert "4 of 6 series prepared (4 now, 2 failed)" in caplog.text
    assert (first["series"], first["prepared"], first["prepared_before"], first["failed"]) == (6, 4, 0, 2)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 8
    assert first["gigabytes"] == pytest.approx(sum(path.stat().st_size for path in files) / 1e9, abs=1e-6)
    assert first["seconds_a_series"] > 0
    before = {path: path.stat().st_mtime_ns for path in files}
    second = run()
    assert (second["prepared"], second["prepared_before"], second["seconds_a_series"]) == (4, 4, None)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_without_a_cache_there_is_nothing_to_prepare_for(data):
    with pytest.raises(ValueError, match="cache_dir: preparing ahead needs a folder"):
        Preparation(SlabDataset(data, Read()))


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
from test_prepare import Read, SERIES
from workflow.dataset import SlabDataset
from workflow.prepare import Preparation
data = [{{"image": f"{{sys.argv[1]}}/{{i}}"}} for i in range(SERIES)]
print("ready", flush=True)
Preparation(SlabDataset(data, Read(float(sys.argv[4])), cache_dir=sys.argv[2])).run(sys.argv[3])
"""


def start(tmp_path: Path, out: str, seconds: float) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    arguments = [str(tmp_path / "series"), str(tmp_path / "cache"), str(tmp_path / out), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(paths=paths), *arguments], stdout=subprocess.PIPE, text=True
    )


def slabs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.npy"))


def assert_whole(tmp_path: Path, data: list[dict]) -> None:
    """The cache holds every series, right, and nothing besides."""
    found = sorted(np.load(path)[:, 0, 0, 0].tolist() for path in slabs(tmp_path))
    assert found == [[10 * i + k for k in range(3)] for i in range(SERIES)]
    assert len(list((tmp_path / "cache").rglob("*.json"))) == SERIES


@pytest.mark.slow
def test_two_processes_at_once(data, tmp_path):
    running = [start(tmp_path, out, 0.2) for out in ("a", "b")]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    assert_whole(tmp_path, data)
    for out in ("a", "b"):
        assert json.loads((tmp_path / out / "prepare.json").read_text())["prepared"] == SERIES


@pytest.mark.slow
def test_a_killed_one_leaves_nothing_broken(data, tmp_path):
    process = start(tmp_path, "killed", 0.5)
    assert process.stdout.readline() == "ready\n"
    while not slabs(tmp_path):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(slabs(tmp_path)) < SERIES
    os.truncate(slabs(tmp_path)[0], 100)  # as a file system may leave it after a power failure
    second = start(tmp_path, "second", 0.5)  # the parameters of the preparation are part of a slab's name
    assert second.wait(timeout=200) == 0
    assert_whole(tmp_path, data)
    assert json.loads((tmp_path / "second/prepare.json").read_text())["failed"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_looked_at_once_a_run(data, tmp_path, workers, monkeypatch):
    """In all processes together: each look leaves a line in a file."""
    log = tmp_path / "looks"
    original = workflow.cache._stat

    def counted(path: Path) -> list:
        with log.open("a") as file:
            file.write(f"{path}\n")
        return original(path)

    monkeypatch.setattr(workflow.cache, "_stat", counted)
    dataset = SlabDataset(data, Read(), cache_dir=str(tmp_path / "cache"), num_workers=workers)
    dataset.prepare_all()
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate_plain)
    for _ in range(3):
        assert sum(len(batch["image"]) for batch in loader) == SERIES
    looks = log.read_text().splitlines()
    assert len(looks) == len(set(looks)) == 3 * SERIES


def test_without_preparation_each_process_looks_once(data, tmp_path, monkeypatch):
    looks = []
    original = workflow.cache._stat
    monkeypatch.setattr(workflow.cache, "_stat", lambda path: looks.append(path) or original(path))
    dataset = SlabDataset(data, Compose([Read()]), cache_dir=str(tmp_path / "cache"))
    first = [dataset[i]["image"] for i in range(SERIES)]
    for i in range(SERIES):
        assert torch.equal(dataset[i]["image"], first[i])
    assert len(looks) == 3 * SERIES


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "size"), [("voco2d_pretrain", "[96,96,8]"), ("rsna_cnn_lstm", "[40,40,8]")])
def test_the_command(run_bundle, phantoms, tmp_path, bundle, size):
    """Every series of all parts, past one that cannot be read; training then finds them."""
    tree = tmp_path / "rsna"
    shutil.copytree(phantoms, tree)
    folders = sorted((tree / "train_images").glob("*/*"))
    next(iter(sorted(folders[3].iterdir())[5:])).unlink()
    done = run_bundle(bundle, "--dataset_dir", tree, "--output_root", tmp_path, "--run_name", "ahead", "--volume_size",
                      size, "--num_workers", 2, "--device", "cpu", configs=("train.json", "prepare.json"),
                      check=False)  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    report = json.loads((tmp_path / "ahead" / "prepare.json").read_text())
    assert (report["series"], report["failed"]) == (len(folders), 1)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == len(folders) - 1
    failed = pd.read_csv(tmp_path / "ahead" / "failed.csv")
    assert failed["image"].tolist() == [str(folders[3])]
    assert f"{len(folders) - 1} of {len(folders)} series prepared" in done.stdout
