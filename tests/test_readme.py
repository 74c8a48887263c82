# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of the project's README, run as they stand but for paths and size."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")
SMALL = ["--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", "0"]
FEW = ["--max_epochs", "1", "--batch_size", "2"]
VOCO = ["--volume_size", "[96,96,16]", "--crop_size", "[32,32]", "--num_slices", "4", "--hidden_size", "32"]
RSNA = ["--volume_size", "[72,72,16]", "--image_size", "[64,64]", "--num_slices", "8", "--hidden_size", "16"]


def commands(text: str) -> list[str]:
    """The `python -m monai.bundle` lines of the bash blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python -m monai.bundle")]


@pytest.mark.slow
def test_the_commands_of_the_readme_work_one_after_the_other(
    root: Path, phantoms: Path, data_dir: Path, tmp_path: Path
):
    found = commands((root / "README.md").read_text(encoding="utf-8"))
    assert len(found) == 6
    places = {"/data/ct": phantoms, "/data/rsna2023": phantoms, "/data/one_series": data_dir / "crlm_ct_1004",
              "/data/runs": tmp_path}  # fmt: skip
    for command in found:
        for name, path in places.items():
            command = command.replace(name, str(path))
        words = shlex.split(command)[1:]
        training = [] if "inference" in command else FEW
        sizes = VOCO if "voco2d" in command else RSNA
        small = [] if re.search("check_data|folds.json", command) else [*SMALL, *sizes, *training]
        done = subprocess.run([sys.executable, *words, *small], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "one" / "predictions.csv").is_file()
    assert (tmp_path / "one" / "evidence" / "000001.png").is_file()
    assert (tmp_path / "fold0_scores" / "report.html").is_file()


def test_every_link_of_the_readme_leads_somewhere(root: Path):
    text = (root / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert all((root / link).exists() for link in links)


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"\bmake ([a-z][a-z-]*)", text))


def test_every_make_command_exists_and_ci_runs_those_of_the_readme(root: Path):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        code = re.findall(r"```bash\n.*?```|`[^`\n]+`", (root / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert make_targets("\n".join(code)) <= known, name
    first = re.findall(r"```bash\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    ci = re.findall(r"^make ([a-z-]+)", (root / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert make_targets(first) <= set(ci)


def test_the_readme_installs_as_make_does(root: Path):
    """The one command that needs a network: `make demo` runs it with the same requirements."""
    text, makefile = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    assert "python -m venv .venv && .venv/bin/pip install -r requirements.txt && . .venv/bin/activate" in text
    assert "$(PYTHON) -m venv $(VENV)" in makefile
    assert "$(PIP) -r requirements.txt" in makefile


def test_inline_commands_are_modules_that_explain_themselves(root: Path, monkeypatch, capsys):
    text = (root / "README.md").read_text(encoding="utf-8")
    modules = sorted(set(re.findall(r"`python -m (\S+?)(?: --help)?`", text)))
    assert modules == ["demo.dataset", "demo.run"]
    for module in modules:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"bundles/{b}/docs/README.md" for b in BUNDLES)])
def test_no_command_stands_outside_the_blocks_that_are_run(root: Path, name: str):
    text = (root / name).read_text(encoding="utf-8")
    outside = re.sub(r"^```(?:bash|sh)\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^\s*\$?\s*(?:python3?|torchrun|pip|sbatch|srun|make) .*", outside, flags=re.MULTILINE)
    # sh and not bash: of several machines, which stand-ins run elsewhere
    assert all("--nnodes=" in block for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
