# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""run.json: its fields, and that it tells the truth about how a run ended."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose, LoadImaged
from monai.utils import set_determinism
from pydicom.uid import generate_uid
from workflow.dataset import SlabDataset
from workflow.manifest import (
    PACKAGES,
    described,
    environment,
    git_revision,
    parameters,
    peak_memory,
    plain_numbers,
    versions,
)
from workflow.privacy import pseudonym
from workflow.record import RunRecord, data_fingerprint
from workflow.run import RunFolder

NUMBER = {"type": ["number", "null"]}
TEXT = {"type": "string"}
HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def closed(required: dict, **more: object) -> dict:
    return {"type": "object", "properties": required, "required": list(required), "additionalProperties": False, **more}


GIT = closed({"commit": {"pattern": "^[0-9a-f]{40}$"}, "dirty": {"type": "boolean"}})
PART = {
    "result": {"type": "string", "pattern": r"^(started|completed(, \d+ series failed)?|failed|interrupted)$"},
    "error": {"anyOf": [{"type": "null"}, closed({"class": TEXT, "message": TEXT})]},
    "started": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$"},
    "duration_s": {"type": "number", "minimum": 0},
    "command": {"type": "array", "items": TEXT},
    "arguments": {"type": "object"},
    "machine": closed({"platform": TEXT, "cpu_count": {"type": "integer"}, "cuda": {"type": ["string", "null"]}}),
    "versions": closed({name: TEXT for name in ("python", *PACKAGES)}),
    "git": {"anyOf": [{"type": "null"}, GIT]},
    "resume": {"type": ["string", "null"]},
    "config": {"type": "string", "pattern": r"^config(_\d+)?\.json$"},
    "data": {
        "type": "object",
        "additionalProperties": closed(
            {"series": {"type": "integer"}, "fingerprint": {"pattern": "^(slabs|files):[0-9a-f]{64}$"}}
        ),
    },
    "peak_memory": closed({"process_mb": {"minimum": 1}, "largest_child_mb": {"minimum": 0}, "cuda_mb": NUMBER}),
    "metrics": {"type": "object", "additionalProperties": NUMBER},
    "weights": {"anyOf": [{"type": "null"}, closed({"file": {"const": "model.pt"}, "sha256": HASH})]},
}  # fmt: skip
SCHEMA = closed({**PART, "earlier": {"type": "array", "items": closed(PART)}})


def manifest(folder: Path) -> dict:
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, SCHEMA)
    return content


@pytest.fixture(autouse=True)
def _seeds(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    set_determinism(None)


def test_a_finished_run_says_all_there_is_to_say(tmp_path):
    run = RunFolder(tmp_path, "a")
    run.start()
    started = manifest(run.path)
    assert (started["result"], started["weights"]) == ("started", None)
    Path(run.model).write_bytes(b"weights")
    run.metrics["score"] = 0.5
    run.finish()
    content = manifest(run.path)
    assert content["weights"] == {"file": "model.pt", "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert (content["result"], content["error"], content["metrics"]) == ("completed", None, {"score": 0.5})
    assert content["versions"]["torch"] == version("torch")
    assert content["earlier"] == []
    assert content["arguments"] == {}  # pytest's are not MONAI's


def test_a_resumed_run_keeps_what_its_parts_said(tmp_path):
    for number in (1, 2, 3):
        run = RunFolder(tmp_path, "a", resume=None if number == 1 else "latest")
        run.start()
        (run.path / "config.json").write_text(f'{{"part": {number}}}')
        if number != 2:
            run.finish()  # the second was killed
    content = manifest(tmp_path / "a")
    assert [part["result"] for part in content["earlier"]] == ["completed", "interrupted"]
    assert [part["config"] for part in content["earlier"]] == ["config_1.json", "config_2.json"]
    assert [part["resume"] for part in [*content["earlier"], content]] == [None, "latest", "latest"]
    for number, name in enumerate(("config_1.json", "config_2.json", "config.json"), start=1):
        assert json.loads((tmp_path / "a" / name).read_text()) == {"part": number}


ENDS = """
import os, sys
from workflow.run import RunFolder
ends = {"error": RuntimeError("outer"), "interrupt": KeyboardInterrupt(), "exit": SystemExit(3), "worker": None}
ends["error"].__cause__ = ValueError("series 1.2.840.113619.2.55.3 is odd")
for name, end in ends.items():
    if os.fork() == 0:
        run = RunFolder(sys.argv[1], name)
        run.start()
        if end is not None:
            raise end
        if os.fork() == 0:
            raise ValueError("of a child that is not the run")
        os.wait()
        run.finish()
        sys.exit()
for _ in ends:
    os.wait()
"""


def test_a_run_that_fails_says_so(root, tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: manifest(tmp_path / name) for name in ("error", "interrupt", "exit", "worker")}
    assert {name: content["result"] for name, content in found.items()} == {
        "error": "failed", "interrupt": "interrupted", "exit": "failed", "worker": "completed",
    }  # fmt: skip
    error = found["error"]["error"]
    assert error["class"] == "ValueError"
    assert error["message"].startswith("series uid-")
    assert found["interrupt"]["error"]["class"] == "KeyboardInterrupt"
    assert found["exit"]["error"]["message"] == "the process ended before the run did"
    assert "RuntimeError: outer" in done.stderr  # the traceback is still printed


def test_the_error_hook_of_others_is_left_in_place(tmp_path):
    before = sys.excepthook
    run = RunFolder(tmp_path, "a")
    run.start()
    assert sys.excepthook is not before
    run.finish()
    assert sys.excepthook is before


def test_given_arguments_are_those_of_monais_command_line(monkeypatch, tmp_path):
    config = tmp_path / "train.json"
    config.write_text("{}")
    argv = ["/x/monai/bundle/__main__.py", "run", "--config_file", str(config), "--tracking", "mlflow", "--lr", "0.1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--window", "[1,2]"])
    assert environment()["arguments"] == {"lr": 0.1, "window": [1, 2]}


def test_a_set_of_the_command_line_can_be_written(monkeypatch, tmp_path):
    config = tmp_path / "train.json"
    config.write_text("{}")
    argv = ["/x/monai/bundle/__main__.py", "run", "--config_file", str(config), "--groups", "{'liver'}"]
    monkeypatch.setattr(sys, "argv", argv)
    run = RunFolder(tmp_path, "a")
    run.start()
    run.finish()
    assert manifest(run.path)["arguments"] == {"groups": "{'liver'}"}


def test_no_uid_is_in_a_manifest_whatever_the_settings(monkeypatch, tmp_path):
    uid, config = generate_uid(), tmp_path / "train.json"
    config.write_text("{}")
    argv = ["/x/monai/bundle/__main__.py", "run", "--config_file", str(config), "--dataset_dir", f"/data/{uid}"]
    monkeypatch.setattr(sys, "argv", argv)
    run = RunFolder(tmp_path, "a", resume=f"/data/{uid}/checkpoint.pt")
    run.start()
    sys.excepthook(ValueError, ValueError(f"/data/{uid} is odd"), None)
    assert uid not in (run.path / "run.json").read_text()
    content, hidden = manifest(run.path), f"uid-{pseudonym(uid)}"
    assert content["arguments"] == {"dataset_dir": f"/data/{hidden}"}
    assert content["command"][-1] == f"/data/{hidden}"
    assert content["error"] == {"class": "ValueError", "message": f"/data/{hidden} is odd"}


def test_without_the_module_that_windows_lacks_memory_is_not_known(monkeypatch):
    monkeypatch.setattr("workflow.manifest.HAS_RESOURCE", False)
    assert peak_memory() == {"process_mb": None, "largest_child_mb": None, "cuda_mb": peak_memory()["cuda_mb"]}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True,
                          text=True).stdout.strip()  # fmt: skip


def test_git_revision_is_that_of_the_checkout_that_tracks_the_file(tmp_path, monkeypatch):
    file = tmp_path / "repo" / "workflow" / "manifest.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    assert git_revision(file) is None
    git(tmp_path, "init", "-q", "repo")
    assert git_revision(file) is None  # a packed bundle within somebody's repository
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-qm", "first")
    commit = git(tmp_path / "repo", "rev-parse", "HEAD")
    assert git_revision(file) == {"commit": commit, "dirty": False}
    file.write_text("2")
    assert git_revision(file) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_revision(file) is None


def dataset(folder: Path, cache_dir: Path | None, values: tuple[int, ...] = (1, 2), uid: str = "1.2.3") -> SlabDataset:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number, value in enumerate(values):
        path = folder / f"{number}.nii"
        if not path.exists():
            nib.save(nib.Nifti1Image(np.full((4, 4, 3 + value), value, dtype=np.int16), np.eye(4)), path)
        items.append({"image": str(path), "series_id": f"{uid}.{number}", "patient_id": str(number)})
    found = SlabDataset(items, Compose([LoadImaged("image", ensure_channel_first=True)]), cache_dir=cache_dir)
    found.prepare_each()
    return found


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_data_elsewhere_have_the_same_fingerprint(tmp_path, cached):
    uid = generate_uid()

    def of(name: str, **options: object) -> dict:
        return data_fingerprint(dataset(tmp_path / name, tmp_path / f"c_{name}" if cached else None, **options))

    first = of("a", uid=uid)
    assert first["series"] == 2
    assert first["fingerprint"].startswith("slabs:" if cached else "files:")
    assert uid not in json.dumps(first)
    assert str(tmp_path) not in json.dumps(first)
    assert of("b", uid=uid) == first
    reversed_order = dataset(tmp_path / "a", tmp_path / "c_a" if cached else None, uid=uid)
    reversed_order.data.reverse()
    assert data_fingerprint(reversed_order) == first
    assert of("c", uid=uid, values=(1, 3)) != first  # other content
    assert of("d", uid=generate_uid()) != first  # other series
    assert of("e", uid=uid, values=(1,)) != first


def test_the_record_brings_data_and_last_figures(tmp_path):
    run, data = RunFolder(tmp_path, "a"), dataset(tmp_path / "a", tmp_path / "cache")
    engine = Engine(lambda engine, batch: None)
    RunRecord(run, {"training": data}).attach(engine)
    engine.add_event_handler("EPOCH_STARTED", lambda e: e.state.metrics.update(loss=e.state.epoch, text="no"))
    engine.run([1], max_epochs=2)
    assert run.metrics == {"loss": 2.0}
    assert run.data == {"training": data_fingerprint(data)}


def test_numbers_are_those_that_json_has():
    metrics = {"a": torch.tensor(1.5), "b": float("nan"), "c": torch.tensor([1, 2]), "d": np.float64(2), "e": "x"}
    assert plain_numbers({**metrics, "f": -float("inf")}) == {"a": 1.5, "b": None, "d": 2.0, "f": None}


def test_parameters_are_the_settings_of_a_config(root):
    path = root / "bundles" / "rsna_cnn_lstm" / "configs" / "train.json"
    config = ConfigWorkflow(str(path), workflow_type="train", logging_file=False).parser.get()
    found = parameters(config)
    assert found["max_epochs"] == 20
    assert found["window"] == "[-175, 250]"
    assert found["early_stopping"] == "null"
    assert found["channels_last"] is True
    assert not {"_desc_", "_meta_", "train", "run", "cache_dir", "network", "guard", "labels_file"} & set(found)


def test_an_error_is_described_by_class_and_message():
    assert described("ValueError: a: b") == {"class": "ValueError", "message": "a: b"}
    assert described("KeyboardInterrupt: ") == {"class": "KeyboardInterrupt", "message": ""}


def test_a_package_that_is_absent_is_said_so(monkeypatch):
    monkeypatch.setattr("workflow.manifest.PACKAGES", ("no-such-package-at-all",))
    assert versions()["no-such-package-at-all"] == "not installed"
