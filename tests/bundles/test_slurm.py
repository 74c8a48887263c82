# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The SLURM scripts, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BUNDLES = Path(__file__).parents[2] / "bundles"


def test_submitted_again_it_goes_on_with_a_run_that_has_no_checkpoint_yet(tmp_path):
    for name, text in {"scontrol": "echo node1", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUTPUT_ROOT": str(tmp_path), "RUN_NAME": "r",
                   "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1",
                   "SLURM_GPUS_ON_NODE": "1"}  # fmt: skip
    for started in (False, True):
        if started:
            (tmp_path / "r").mkdir()
            (tmp_path / "r" / "run.json").touch()
        for script in BUNDLES.glob("*/docs/slurm.sh"):
            said = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
            assert ("--resume latest" in said) == started


def test_the_two_bundles_scripts_differ_in_the_data_alone():
    one, other = (script.read_text(encoding="utf-8").splitlines() for script in BUNDLES.glob("*/docs/slurm.sh"))
    differ = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
    assert [line[:20] for pair in differ for line in pair] == ["data=${DATASET_DIR:-"] * 2
