# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, the device and the manifest."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism
from pydicom.uid import generate_uid
from workflow.privacy import pseudonym
from workflow.run import RunFolder, select_device, use_amp, write_atomically


@pytest.fixture(autouse=True)
def _process_state():
    """A run sets seeds and log handlers of the whole process."""
    root, level, factory = logging.getLogger(), logging.getLogger().level, logging.getLogRecordFactory()
    handlers = list(root.handlers)
    yield
    set_determinism(None)
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()


def test_a_run_writes_its_config_manifest_and_log(tmp_path):
    run = RunFolder(tmp_path / "out", "first")
    run.start(seed=3)
    logging.getLogger("any").info("said while running")
    run.finish()
    manifest = json.loads((run.path / "run.json").read_text())
    assert manifest["result"] == "completed"
    assert manifest["command"] == sys.argv
    assert manifest["duration_s"] >= 0
    assert "said while running" in (run.path / "log.txt").read_text()
    assert json.loads((run.path / "config.json").read_text()) == {}  # no workflow called
    assert run.path == tmp_path / "out" / "first"
    assert [run.checkpoints, run.tensorboard, run.model] == [
        str(run.path / name) for name in ("checkpoints", "tensorboard", "model.pt")
    ]
    assert not (run.path / "failed.csv").exists()
    logging.getLogger("any").info("said after it")
    assert "said after it" not in (run.path / "log.txt").read_text()


def test_the_executed_config_holds_the_overrides(tmp_path):
    config = {
        "output_root": str(tmp_path),
        "run_name": "a",
        "number": 1,
        "net": {"deep": {"width": 3}},
        "run_folder": {"_target_": "workflow.run.RunFolder", "output_root": "@output_root", "run_name": "@run_name"},
        "initialize": [],
        "run": ["$@run_folder.start()"],
        "finalize": ["$@run_folder.finish()"],
    }
    (tmp_path / "train.json").write_text(json.dumps(config))
    override = {"number": 2, "net#deep#width": 5, "run_name": "b"}
    workflow = ConfigWorkflow(str(tmp_path / "train.json"), workflow_type="train", logging_file=False, **override)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["number"], written["net"]["deep"]["width"], written["run_name"]) == (2, 5, "b")
    assert "_meta_" not in written
    assert written["run"] == config["run"]


def test_a_run_never_overwrites_another(tmp_path):
    RunFolder(tmp_path, "a").start()
    before = (tmp_path / "a" / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"a holds a run already: choose another run_name, or .*--resume latest"):
        RunFolder(tmp_path, "a").start()
    assert (tmp_path / "a" / "run.json").read_bytes() == before
    RunFolder(tmp_path, "b").start()
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path, "empty").start()
    for name in ("tensorboard", "checkpoints"):  # building a workflow leaves neither: see test_conformance.py
        (tmp_path / f"older_{name}" / name).mkdir(parents=True)
        with pytest.raises(FileExistsError):
            RunFolder(tmp_path, f"older_{name}").start()


def test_a_run_goes_on_only_where_there_is_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to go on with"):
        RunFolder(tmp_path, "a", resume="latest").start()
    assert not (tmp_path / "a").exists()
    RunFolder(tmp_path, "a").start()
    RunFolder(tmp_path, "a", resume="latest").start()
    RunFolder(tmp_path, "a", resume=str(tmp_path / "other.pt")).start()
    RunFolder(tmp_path, "c", resume=str(tmp_path / "other.pt")).start()  # a new run from another's checkpoint
    with pytest.raises(ValueError, match="needs the run_name"):
        RunFolder(tmp_path, None, resume="latest")


def test_other_processes_neither_write_nor_refuse_what_the_main_one_made(tmp_path):
    other = RunFolder(tmp_path, "a")
    other.start(main_process=False)
    other.finish(main_process=False)
    assert not (tmp_path / "a").exists()
    RunFolder(tmp_path, "a").start()
    other.start(main_process=False)  # comes late: the folder is there already
    # the status is the main one's, whom torchrun would end in the middle of its files
    other.finish([("s", "why")], main_process=False)
    assert not (tmp_path / "a" / "failed.csv").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "../a", "a/b", "/tmp/a", "a/", "a/.."])
def test_a_run_name_cannot_leave_the_output_folder(tmp_path, name):
    with pytest.raises(ValueError, match="run_name: expected a plain folder name"):
        RunFolder(tmp_path, name)


@given(name=st.text(alphabet="ab./\\ ~", max_size=6))
@settings(deadline=None, max_examples=100)
def test_any_accepted_name_is_a_child_of_the_output_folder(name):
    try:
        path = RunFolder("/out", name).path
    except ValueError:
        return
    assert path.resolve().parent == Path("/out")


def test_without_a_name_the_time_is_the_name(tmp_path):
    assert RunFolder(tmp_path).path.name[:2] == "20"
    assert RunFolder(tmp_path, 7).path.name == "7"  # Fire reads a number


def test_failed_series_are_listed_and_end_with_status_1(tmp_path):
    run = RunFolder(tmp_path, "a")
    run.start()
    with pytest.raises(SystemExit) as caught:
        run.finish([("/data/7, left", "SeriesError: a slice is missing"), ("/data/8", 'ValueError: "x"')])
    assert caught.value.code == 1
    table = pd.read_csv(run.path / "failed.csv")
    assert table.values.tolist() == [
        ["/data/7, left", "SeriesError: a slice is missing"],
        ["/data/8", 'ValueError: "x"'],
    ]
    assert json.loads((run.path / "run.json").read_text())["result"] == "completed, 2 series failed"
    assert "2 series failed" in (run.path / "log.txt").read_text()


def test_a_manifest_is_completed_after_the_list_of_what_failed(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, "a")
    run.start()

    def refuse(path: Path, content: str) -> None:
        raise OSError(f"no space for {path.name}")

    with monkeypatch.context() as patch:
        patch.setattr("workflow.run.write_atomically", refuse)
        with pytest.raises(OSError, match=r"no space for failed\.csv"):
            run.finish([("/data/7", "ValueError: damaged")])
    assert sorted(path.name for path in run.path.glob("failed*")) == []
    assert json.loads((run.path / "run.json").read_text())["result"] == "started"
    with pytest.raises(SystemExit):
        run.finish([("/data/7", "ValueError: damaged")])
    assert json.loads((run.path / "run.json").read_text())["result"] == "completed, 1 series failed"


def test_anonymise_names_failed_series_by_pseudonyms(tmp_path, monkeypatch):
    uid = generate_uid()
    monkeypatch.setattr(sys, "argv", ["run", f"--dataset_dir=/data/{uid}"])
    run = RunFolder(tmp_path, "a", anonymise=True)
    run.start()
    logging.getLogger("any").warning("%s is odd", uid)
    with pytest.raises(SystemExit):
        run.finish([(f"/data/{uid}/8", f"SeriesError: /data/{uid}/8/3.dcm: expected pixels, found none")])
    name = f"{pseudonym(uid)}/{pseudonym('8')}"
    table = pd.read_csv(run.path / "failed.csv")
    assert table.values.tolist() == [[name, f"SeriesError: {name}/3.dcm: expected pixels, found none"]]
    assert not any(uid in file.read_text() for file in run.path.iterdir())
    assert f"uid-{pseudonym(uid)} is odd" in (run.path / "log.txt").read_text()


def test_the_seed_decides_every_generator(tmp_path):
    def draw(name: str, seed: int) -> tuple:
        RunFolder(tmp_path, name).start(seed=seed)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    first = draw("a", 5)
    assert draw("b", 5) == first
    assert draw("c", 6) != first
    with pytest.raises(ValueError, match="seed: expected an integer, got None"):
        draw("d", None)


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_can_be_turned_off_and_the_seed_holds(tmp_path, monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    RunFolder(tmp_path, "a", deterministic=deterministic).start(seed=5)
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.initial_seed() == 5


def test_a_device_that_is_absent_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert select_device(None) == torch.device("cpu")
    assert "device: cpu" in caplog.text
    assert select_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device: '{name}' was asked for, but .* finds no CUDA device"):
            select_device(name)


def test_cuda_is_taken_where_present(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with caplog.at_level(logging.INFO):
        assert select_device(None).type == "cuda"
    assert "device: cuda (a GPU)" in caplog.text


def test_mixed_precision_is_for_gpus():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    cases = [(None, cpu), (False, cpu), (None, cuda), (False, cuda), (True, cuda)]
    assert [use_amp(*case) for case in cases] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="amp: mixed precision needs a CUDA device, the device is cpu"):
        use_amp(True, cpu)


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_atomically(path, "old")
    assert path.stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr("workflow.run.os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]  # nothing temporary stays


def test_bytes_are_written_as_they_are(tmp_path):
    write_atomically(tmp_path / "new" / "file.png", b"\x89PNG\r\n")
    assert (tmp_path / "new" / "file.png").read_bytes() == b"\x89PNG\r\n"
