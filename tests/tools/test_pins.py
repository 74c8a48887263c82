# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Constraints for pip from what the bundles pin."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.pins import constraints, main


def metadata(path: Path, **changes: str) -> Path:
    content = {"monai_version": "1.6.1", "pytorch_version": "2.13.0", "numpy_version": "2.2.6"}
    content |= {name: changes.pop(name) for name in list(changes) if name in content}
    path.write_text(json.dumps({**content, "required_packages_version": {"timm": "1.0.31", **changes}}))
    return path


def test_versions_of_all_files_together(tmp_path: Path) -> None:
    files = [metadata(tmp_path / "a.json"), metadata(tmp_path / "b.json", scipy="1.15.3", tqdm="4.1.post1")]
    assert constraints(files) == [
        "monai===1.6.1",
        "numpy===2.2.6",
        "scipy===1.15.3",
        "timm===1.0.31",
        "torch===2.13.0",
        "tqdm===4.1.post1",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timm": "1.0.30"}, r"timm is 1\.0\.31 in .*a\.json and 1\.0\.30 in .*b\.json"),
        ({"pytorch_version": "2.15.0"}, r"torch is 2\.13\.0 in .*a\.json and 2\.15\.0 in .*b\.json"),
        ({"numpy_version": ">=2.2"}, r"b\.json: numpy is pinned to '>=2\.2', expected a plain version"),
        ({"pytorch_version": "2.13.0+cpu"}, r"torch is pinned to '2\.13\.0\+cpu'"),
    ],
)
def test_what_no_environment_can_hold_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraints([metadata(tmp_path / "a.json"), metadata(tmp_path / "b.json", **changes)])


def test_no_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing is pinned"):
        constraints([])


def test_as_make_calls_it(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every package of requirements.txt is constrained, and no other."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(root / "tools" / "pins.py"), run_name="__main__")
    assert ended.value.code is None
    lines = capsys.readouterr().out.splitlines()
    required = (line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines())
    assert {line.split("===")[0] for line in lines} == {Requirement(line).name for line in required if line}


def test_a_fault_is_the_last_line_and_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a" / "configs").mkdir(parents=True)
    metadata(tmp_path / "a" / "configs" / "metadata.json", timm="newest")
    assert "timm is pinned to 'newest'" in main(tmp_path)
    assert capsys.readouterr().out == ""


def test_it_runs_before_anything_is_installed(root: Path) -> None:
    tree = ast.parse((root / "tools" / "pins.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
