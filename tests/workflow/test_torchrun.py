# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of two real processes under torchrun: one of them dies, fails or hangs, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from workflow.checkpoint_files import newest_checkpoint

from tests.ports import free_port

pytestmark = pytest.mark.slow

BUNDLE = "rsna_cnn_lstm"
ADVICE = "go on with --resume latest, with as many processes as you like"
# 24 patients in 3 folds: 16 and more series to train, 4 steps of 2 processes an epoch
SMALL = (
    "--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--volume_size", "[40,40,8]",
    "--image_size", "[32,32]", "--num_slices", 4, "--hidden_size", 16, "--num_folds", 3, "--batch_size", 2,
)  # fmt: skip
FAULT = '''
import os, pathlib, signal, time
from ignite.engine import Events

class Fault:
    """Handler: what happens to one rank in the second step of one epoch: the first needed the other rank, which so has
    saved the epoch before."""

    def __init__(self, kind, rank, epoch, mark):
        self.kind, self.here, self.epoch, self.mark = kind, int(os.environ["RANK"]) == rank, epoch, mark

    def attach(self, engine):
        if self.here:
            engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine):
        if engine.state.epoch == self.epoch and engine.state.iteration % engine.state.epoch_length == 2:
            pathlib.Path(self.mark).touch()
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hanging":
                time.sleep(600)
            raise ValueError("slab.npy: cannot be read")
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
            overlay.write_text(
                json.dumps({"+train#handlers": [{"_target_": "faults.Fault", "mark": str(tmp_path / "mark"), **fault}]})
            )
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


def failure(folder: Path) -> tuple[str, str, str]:
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return content["result"], content["error"]["class"], content["error"]["message"]


def logged(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


def ended(job: subprocess.Popen) -> str:
    """What a job that failed has said."""
    output, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None), output[-3000:]
    return output


def position(folder: Path) -> dict:
    return torch.load(newest_checkpoint(folder / "checkpoints"), weights_only=True)["progress"]


def test_a_killed_rank_ends_the_job_which_resumes_with_another_world_size(torchrun, run_bundle, phantoms, tmp_path):
    folder, run = tmp_path / "r", ("--run_name", "r", "--max_epochs", 4)
    output = ended(torchrun(*run, fault={"kind": "killed", "rank": 1, "epoch": 2}))
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 60
    line = f"rank 1 of 2 ended, and rank 0 with it; {ADVICE}"
    assert f"error: PeerEnded: {line}" in output
    assert line in logged(folder)
    assert failure(folder) == ("failed", "PeerEnded", line)
    assert re.search(r"Root Cause.*rank +: 1 .*SIGKILL", output, re.DOTALL)
    two = position(folder)
    assert (two["epochs"], two["samples"], two["iteration"]) == (1, 0, two["epoch_length"])
    # one process has twice the steps; it stops after one epoch of two
    resume = ("--run_name", "r", "--resume", "latest")
    run_bundle(BUNDLE, "--dataset_dir", phantoms, "--output_root", tmp_path, *SMALL, *resume, "--max_epochs", 2)
    one = position(folder)
    assert (one["epochs"], one["samples"]) == (2, 0)
    assert one["epoch_length"] == pytest.approx(2 * two["epoch_length"], abs=1)
    assert one["iteration"] == 2 * one["epoch_length"]
    # and two processes go on from there
    job = torchrun(*resume, "--max_epochs", 3)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output[-3000:]
    last = position(folder)
    assert (last["epochs"], last["epoch_length"], last["iteration"]) == (
        3,
        two["epoch_length"],
        3 * two["epoch_length"],
    )
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["result"] == "completed"


def test_an_error_of_one_rank_ends_all_and_comes_first(torchrun, tmp_path):
    output = ended(torchrun("--run_name", "r", "--max_epochs", 2, fault={"kind": "raises", "rank": 0, "epoch": 1}))
    error = "slab.npy: cannot be read"
    assert output.index(f"error: ValueError: {error}") < output.index(
        f"rank 0 of 2 ended, and rank 1 with it; {ADVICE}"
    )
    assert re.search(rf"Root Cause.*rank +: 0 .*RankError: ValueError: {error}", output, re.DOTALL)
    assert failure(tmp_path / "r") == ("failed", "ValueError", error)


def test_a_rank_that_hangs_ends_the_job_after_timeout_minutes(torchrun, tmp_path):
    fault = {"kind": "hanging", "rank": 1, "epoch": 1}
    output = ended(torchrun("--run_name", "r", "--max_epochs", 2, "--timeout_minutes", 0.3, fault=fault))
    line = "rank 0 of 2 cannot go on: it waited for the others for timeout_minutes: "
    assert f"PeerEnded: {line}" in output
    result, kind, message = failure(tmp_path / "r")
    assert (result, kind) == ("failed", "PeerEnded")
    assert message.startswith(line)


# what SLURM has: a job of two nodes, on each of which `srun` starts one task
CLUSTER = {
    "scontrol": '[[ "$1 $2 $3" == "show hostnames node[1-2]" ]] && printf "127.0.0.1\\nnode2\\n"',
    "srun": """[[ $1 == --kill-on-bad-exit=1 ]] && shift
SLURM_NODEID=0 SLURM_LOCALID=0 "$@" >"$LOGS/0" 2>&1 & first=$!
SLURM_NODEID=1 SLURM_LOCALID=0 "$@" >"$LOGS/1" 2>&1
wait $first""",
}


def test_the_slurm_script_trains_on_two_nodes_by_torchruns_rendezvous(root, phantoms, tmp_path):
    """Two torchrun with a process each, which meet at the first node's address; stand-ins for SLURM's two commands."""
    for name, text in CLUSTER.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    own = Path(sys.executable).parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PATH": f"{tmp_path}{os.pathsep}{own}{os.pathsep}{os.environ['PATH']}", "LOGS": str(tmp_path),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "DATASET_DIR": str(phantoms), "OUTPUT_ROOT": str(tmp_path), "RUN_NAME": "r", "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for again in (False, True):
        done = subprocess.run(
            ["bash", "docs/slurm.sh", *map(str, SMALL), "--max_epochs", "1", "--backend", "gloo"],
            cwd=root / "bundles" / BUNDLE, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        logs = [(tmp_path / name).read_text(encoding="utf-8") for name in "01"]
        assert done.returncode == 0, (done.stderr, *logs)
        assert ("nothing left to do: 1 of 1 epochs are done" in "".join(logs)) == again
    assert json.loads((tmp_path / "r" / "run.json").read_text(encoding="utf-8"))["result"] == "completed"
    assert position(tmp_path / "r")["epochs"] == 1
    assert sorted("run folder: " in log for log in logs) == [False, True]  # one process of the two writes
