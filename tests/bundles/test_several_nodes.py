# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The script for SLURM, as far as it can be read without a cluster; tests/workflow/test_torchrun.py runs it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")
MARK = "on a cluster, and with GPUs on several nodes, we have not run it"

bundles = pytest.mark.parametrize("bundle", BUNDLES)


def script(root: Path, bundle: str) -> str:
    return (root / "bundles" / bundle / "docs" / "slurm.sh").read_text(encoding="utf-8")


def launch(text: str) -> dict[str, str]:
    """The options of a `torchrun` command."""
    command = re.search(r"^(?:srun \S+ )?(torchrun .*)", text, re.DOTALL | re.MULTILINE).group(1).replace("\\\n", " ")
    options = [word for word in shlex.split(command.split(" -m ")[0]) if word.startswith("--")]
    return dict(option[2:].split("=", 1) for option in options)


@bundles
def test_the_script_is_bash_and_stops_at_the_first_error(root: Path, bundle: str) -> None:
    text = script(root, bundle)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines[1:], 1) if not line.startswith("#"))
    assert lines[first] == "set -euo pipefail"
    # SLURM reads its options up to the first command
    assert all(number < first for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    # variables are quoted where they become arguments
    commands = re.sub(r"\[\[.*?\]\]|^#.*?$|^\w+=.*?$", "", text, flags=re.MULTILINE)
    assert not re.findall(r'(?<!["\w/:}])\$\{?\w+', re.sub(r'"[^"]*"', "", commands))
    assert "--ntasks-per-node=1" in text  # torchrun starts the processes, not srun


@bundles
def test_readme_and_script_meet_in_the_same_way(root: Path, bundle: str) -> None:
    readme = (root / "bundles" / bundle / "docs" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    own, of_script = launch(block), launch(script(root, bundle))
    assert set(own) == set(of_script) == {"nnodes", "nproc_per_node", "rdzv_id", "rdzv_backend", "rdzv_endpoint"}
    assert own["rdzv_backend"] == of_script["rdzv_backend"] == "c10d"
    files = re.findall(r'--config_file ("[^"]*")', block + script(root, bundle))
    assert len(files) == 2
    assert files[0] == files[1]
    assert MARK in " ".join(readme.split())
