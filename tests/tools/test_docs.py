# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/sharing.md, run as they stand but for paths; those of other repositories name what exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import push_to_hf_hub

from tools.bundle_weights import default_network
from tools.pack import BUNDLES


def blocks(root: Path, language: str) -> list[str]:
    text = (root / "docs" / "sharing.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_commands_run_one_after_the_other(root: Path, tmp_path: Path) -> None:
    for name, run in zip(BUNDLES, ("pretrain", "fold0"), strict=True):
        (tmp_path / "output" / run).mkdir(parents=True)
        torch.save(default_network(root, name).state_dict(), tmp_path / "output" / run / "model.pt")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
    packing, checking, loading, elsewhere = blocks(root, "bash")
    for command in (packing, checking, loading, elsewhere):
        text = command.replace("/workspace/", f"{tmp_path}/").replace("--out dist", f"--out {tmp_path}/dist")
        done = subprocess.run(["bash", "-euc", text], cwd=tmp_path if command in (checking, loading) else root,
                              text=True, env=environment, capture_output=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        if command == checking:
            assert done.stdout.splitlines() == ["model.pt: OK", "model.safetensors: OK"]
        if command == loading:
            assert done.stdout.splitlines()[-1] == "CNNLSTM"
    assert (tmp_path / "dist" / "rsna_cnn_lstm" / "large_files.yml").is_file()
    assert (tmp_path / "dist" / "voco2d_pretrain" / "models" / "model.safetensors").is_file()


def test_what_is_said_of_other_repositories_holds(root: Path) -> None:
    push = blocks(root, "text")[1]
    flags = {word.removeprefix("--") for word in push.split() if word.startswith("--")}
    assert flags <= set(push_to_hf_hub.__annotations__)
    text = (root / "docs" / "sharing.md").read_text(encoding="utf-8")
    assert (root / "tests" / "data" / "meta_schema_20240725.json").is_file()
    for name in BUNDLES:
        schema = json.loads((root / "bundles" / name / "configs" / "metadata.json").read_text())["schema"]
        assert schema.rsplit("/", 1)[1] in text


def test_make_pack_hands_weights_on(root: Path, tmp_path: Path) -> None:
    def words(*arguments: str) -> str:
        command = ["make", "--dry-run", "--no-print-directory", "pack", f"VENV={tmp_path}", *arguments]
        alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, check=True)
        return " ".join(done.stdout[done.stdout.index("-m tools.pack") :].replace("\\\n", " ").split())

    assert words() == "-m tools.pack --out dist"
    assert words("VOCO_WEIGHTS=a b.pt") == '-m tools.pack --out dist --weights "voco2d_pretrain=a b.pt"'
    assert words("RSNA_WEIGHTS=c.pt") == '-m tools.pack --out dist --weights "rsna_cnn_lstm=c.pt"'


DOCUMENTS = ("*.md", "docs/*.md", "apps/*/README.md", "bundles/*/docs/*.md")


def test_lines_of_the_documents_are_within_the_limit(root: Path) -> None:
    """Tables and commands, which cannot be broken, are as long as they are."""
    files = [file for pattern in DOCUMENTS for file in root.glob(pattern)]
    assert len(files) > 7
    for file in files:
        prose = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not long, (file, long)
