# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/zoo.md: every point of the zoo's checklist has its row, and what holds it exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

POINTS = 32


def rows(text: str) -> list[tuple[str, str, str]]:
    """(point, what, held by) of the table."""
    found = re.findall(r"^\| *(\d+) *\|(.*)\|(.*)\|$", text, flags=re.MULTILINE)
    return [(point, what.strip(), held.strip()) for point, what, held in found]


@cache
def named_tests(path: Path) -> set[str]:
    """Names of the tests of a file; those of a class as ``Class::test``."""
    if not path.is_file():
        return set()
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in found if name.rsplit("::", 1)[-1].startswith("test_")}


def absent(held: str, root: Path) -> list[str]:
    """Tests and targets of make that a row names and that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    names = re.findall(r"`([^`]+\.py)::([\w:]+)`", held)
    missing = [f"{path}::{name}" for path, name in names if name not in named_tests(root / "tests" / path)]
    return missing + [f"make {target}" for target in re.findall(r"`make ([a-z-]+)`", held) if target not in targets]


def test_every_point_has_its_row(root: Path) -> None:
    table = rows((root / "docs" / "zoo.md").read_text(encoding="utf-8"))
    assert [int(point) for point, _, _ in table] == list(range(1, POINTS + 1))
    assert all(what for _, what, _ in table)


def test_what_holds_a_point_exists(root: Path) -> None:
    table = rows((root / "docs" / "zoo.md").read_text(encoding="utf-8"))
    unheld = [point for point, _, held in table if not re.search(r"\.py::test_|::test_", held)]
    assert not unheld
    missing = {point: names for point, _, held in table if (names := absent(held, root))}
    assert not missing


@pytest.mark.parametrize(
    "held",
    [
        "`bundles/test_conformance.py::test_of_nothing`",
        "`bundles/test_nowhere.py::test_structure`",
        "`bundles/test_conformance.py::read`",
        "`make nothing`",
    ],
)
def test_a_name_of_nothing_is_found(root: Path, held: str) -> None:
    assert absent("`bundles/test_conformance.py::test_structure`, `make lint`", root) == []
    assert len(absent(f"`bundles/test_conformance.py::test_structure`, {held}", root)) == 1
