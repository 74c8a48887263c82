# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of two real processes under torchrun: one of them dies, fails or hangs, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BUNDLE = "rsna_cnn_lstm"
ADVICE = "go on with --resume latest, with as many processes as you like"
# 24 patients in 3 folds: 16 and more series to train, 4 steps of 2 processes an epoch
SMALL = (
    "--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--volume_size", "[40,40,8]",
    "--image_size", "[32,32]", "--num_slices", 4, "--hidden_size", 16, "--num_folds", 3, "--batch_size", 2,
)  # fmt: skip
FAULT = '''
import os, signal, time
import torch
from ignite.engine import Events

class Fault:
    """Handler: what happens to one rank in one epoch."""

    def __init__(self, kind, rank, epoch):
        self.kind, self.here, self.epoch = kind, int(os.environ["RANK"]) == rank, epoch

    def attach(self, engine):
        if self.here:
            engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine):
        if engine.state.epoch == self.epoch:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hanging":
                time.sleep(600)
            engine.state.batch["image"].fill_(float("nan"))
'''


@pytest.fixture
def torchrun(root: Path, phantoms: Path, tmp_path: Path):
    """`torchrun` on two CPU processes as a user calls it, with a fault in one of them."""

    def start(*arguments: object, fault: dict | None = None, launch: tuple = ("--standalone", "--nproc_per_node", 2)):
        files = ["configs/train.json", "configs/multi_gpu_train.json"]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if fault:
            (tmp_path / "faults.py").write_text(FAULT)
            overlay = tmp_path / "fault.json"
            overlay.write_text(json.dumps({"+train#handlers": [{"_target_": "faults.Fault", **fault}]}))
            files.append(str(overlay))
            environment["PYTHONPATH"] = str(tmp_path)
        command = [
            str(Path(sys.executable).parent / "torchrun"), *launch, "-m", "monai.bundle", "run",
            "--config_file", str(files), "--backend", "gloo", "--dataset_dir", phantoms, "--output_root", tmp_path,
            *SMALL, *arguments,
        ]  # fmt: skip
        environment |= {"OMP_NUM_THREADS": "1", "COVERAGE_PROCESS_START": str(root / "pyproject.toml"),
                        "COVERAGE_FILE": str(root / ".coverage")}  # fmt: skip
        return subprocess.Popen(
            list(map(str, command)), cwd=root / "bundles" / BUNDLE, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_killed_rank_ends_the_job_which_resumes_with_another_world_size(torchrun, run_bundle, phantoms, tmp_path):
    folder, run = tmp_path / "r", ("--run_name", "r")
    job = torchrun(*run, "--max_epochs", 4, fault={"kind": "killed", "rank": 1, "epoch": 2})
    output, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None)
    line = f"rank 1 of 2 ended, and rank 0 with it; {ADVICE}"
    assert line in output
    assert line in (folder / "log.txt").read_text(encoding="utf-8")
    assert manifest(folder)["result"] == f"failed: {line}"
    assert re.search(r"Root Cause.*rank +: 1 .*SIGKILL", output, re.DOTALL)


def test_an_error_of_one_rank_ends_all_and_comes_first(torchrun, tmp_path):
    job = torchrun("--run_name", "r", "--max_epochs", 2, fault={"kind": "not a number", "rank": 0, "epoch": 1})
    output, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None)
    error = "FloatingPointError: the loss is nan at iteration 1 (epoch 1), series "
    assert output.index(f"error: {error}") < output.index(f"rank 0 of 2 ended, and rank 1 with it; {ADVICE}")
    assert re.search(rf"Root Cause.*rank +: 0 .*RankError: {re.escape(error)}", output, re.DOTALL)
    assert manifest(tmp_path / "r")["result"].startswith(f"failed: {error}")
    assert "the run failed after" in (tmp_path / "r" / "log.txt").read_text(encoding="utf-8")


def test_a_rank_that_hangs_ends_the_job_after_timeout_minutes(torchrun, tmp_path):
    fault = {"kind": "hanging", "rank": 1, "epoch": 1}
    job = torchrun("--run_name", "r", "--max_epochs", 2, "--timeout_minutes", 0.1, fault=fault)
    output, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None)
    assert "rank 0 of 2 cannot go on: it waited for the others for timeout_minutes: " in output
    assert manifest(tmp_path / "r")["result"].startswith("failed: rank 0 of 2 cannot go on")
