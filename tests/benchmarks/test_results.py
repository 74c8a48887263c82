# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables in docs/benchmarks.md are those of the committed results, to the digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale import table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["scale", "scale_512"])
def test_the_document_says_what_was_measured(root: Path, name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    document = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table(results["rows"]) in document
    for key, value in results["machine"].items():
        assert f"- {key}: {value}" in document


def test_every_result_is_in_the_document(root: Path) -> None:
    document = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"benchmarks/results/{path.name}" in document for path in RESULTS.iterdir())
