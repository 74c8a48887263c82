# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of growing numbers of series runs, and its table says what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale import STEPS, main, table


def test_the_table_has_the_ratios_to_the_smallest() -> None:
    rows = [
        {"step": step, "series": n, "seconds": n * 0.01 * k, "peak_mb": 300.0 + n}
        for k, step in enumerate(STEPS, start=1)
        for n in (200, 50)
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(STEPS)
    assert lines[2] == "| index | 50 | 1.0 | 0.500 | 1.0 | 10.00 | 350 |"
    assert lines[3] == "| index | 200 | 4.0 | 2.000 | 4.0 | 10.00 | 500 |"


@pytest.mark.slow
def test_it_runs(tmp_path, capsys) -> None:
    main(["--series", "8", "--repeats", "1", "--out", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["step"], row["series"]) for row in results["rows"]] == [(step, 8) for step in STEPS]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 50 for row in results["rows"])
    printed = capsys.readouterr().out
    assert table(results["rows"]) in printed
    assert f"- torch: {results['machine']['torch']}" in printed
