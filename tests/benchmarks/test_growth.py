# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How cost grows: the series that are measured are what they are said to be, fits and statements, and it runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from benchmarks.common import ROOT, header, spread
from benchmarks.growth import report
from benchmarks.growth.__main__ import PARTS, SMOKE, begin, main
from benchmarks.growth.fits import exponent, last_exponent, line, memory_slope
from benchmarks.growth.trees import every_nth, write_long, write_tree


def rows_of(part: str, step: str, law, memory=lambda x: 900.0, xs=(50, 500, 5000)) -> list[dict]:
    """Rows whose seconds and memory follow a law."""
    return [
        {"part": part, "x": x, "step": step, "runs": [law(x)] * 3, "seconds": spread([law(x)] * 3),
         "peak_mb": spread([memory(x)])}
        for x in xs
    ]  # fmt: skip


def results_of(rows: list[dict]) -> dict:
    return header("benchmarks.growth", [], True) | {"rows": rows, "sizes": dict.fromkeys(PARTS, SMOKE)}


def test_a_line_is_that_of_the_normal_equations_with_students_interval() -> None:
    x, y = np.array([1.0, 2, 4, 8, 9]), np.array([1.0, 2.5, 3, 9, 8])
    design = np.stack([np.ones(5), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    intercept, slope = inverse @ design.T @ y
    variance = ((y - design @ [intercept, slope]) ** 2).sum() / 3
    margin = 3.182446 * math.sqrt(variance * inverse[1, 1])  # t(3), 97.5 %
    assert line(x, y) == pytest.approx((slope, slope - margin, slope + margin, intercept), rel=1e-6)
    assert line([1, 2], [1, 3])[:3] == (2.0, -math.inf, math.inf)


def test_exponents_of_a_power_and_with_a_part_that_does_not_grow() -> None:
    assert exponent(rows_of("series", "check", lambda x: 3 * x**1.5)).slope == pytest.approx(1.5)
    rows = rows_of("series", "check", lambda x: 1000 + x**1.5)
    assert exponent(rows).slope < 1.3 < last_exponent(rows)
    assert memory_slope(rows_of("series", "check", float, lambda x: 5 + 0.25 * x)).slope == pytest.approx(0.25)


def test_targets_are_judged_by_the_figures() -> None:
    good = rows_of("series", "check", lambda x: 0.01 * x, lambda x: 900 + 0.009 * x)
    text = report.section(results_of(good))
    assert "- check: seconds ~ series^1.00 (1.00 to 1.00), between the two largest ^1.00" in text
    assert "+9.0 MB for 1,000 series more (target: at most 10): reached" in text
    assert "MISSED" not in text
    assert "| check | 5,000 | 100.0 | 50.000 (50.000 to 50.000) | 100.00 | 10.00 | 945 | 1.05 |" in text
    # quadratic in the end, hidden in the fit by what does not grow
    bad = rows_of("series", "check", lambda x: 0.5 + 1e-6 * x**2, lambda x: 900 + 0.011 * x)
    assert exponent(bad).slope < report.LINEAR < last_exponent(bad)
    assert report.section(results_of(bad)).count("**MISSED**") == 2
    assert "+11.0 MB for 1,000 series more (target: at most 10): **MISSED**" in report.section(results_of(bad))
    worse = rows_of("series", "check", lambda x: x**1.2)
    assert "^1.20; at most linear (target: at most ^1.1): **MISSED**" in report.section(results_of(worse))


def test_statements_of_batches_and_workers() -> None:
    batch = rows_of("batch", "pretraining step", lambda x: 0.5 + 0.5 * x, lambda x: 900 + 30 * x, (1, 2, 4))
    workers = rows_of("workers", "loader", lambda x: {0: 3.0, 1: 2.0, 2: 1.0, 4: 1.5}[x], xs=(0, 1, 2, 4))
    text = report.section(results_of(batch + workers))
    assert "a volume in a batch of 4 takes 0.62 times what it takes in one of 1; each volume more takes 30 MB" in text
    assert "- loader: fastest with 2 workers, 3.00 times as fast as with 0" in text
    assert "| loader | 4 | 1.500 (1.500 to 1.500) | 0.50 | 900 | 1.00 |" in text
    assert report.headline(results_of(batch)) is None


def test_a_tree_holds_series_of_their_own(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", 27, 32, 8)  # more than are rendered: two series share their pixels
    files = [next(folder.iterdir()) for folder in sorted(tree.glob("train_images/*/*"))]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    for tag in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        assert len({header[tag].value for header in headers}) == 27
    lines = (tree / "train.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [file.parents[1].name for file in files]


def test_shorter_series_show_the_same_body_in_equal_steps(tmp_path) -> None:
    longest = write_long(tmp_path / "longest", 24, 32)
    whole = [pydicom.dcmread(file).ImagePositionPatient[2] for file in longest.iterdir()]
    part = [pydicom.dcmread(file).ImagePositionPatient[2] for file in every_nth(longest, tmp_path / "6", 6).iterdir()]
    steps = np.diff(sorted(part))
    assert len(whole) == 24
    assert steps == pytest.approx([4 * np.diff(sorted(whole)).mean()] * 5, abs=1e-4)
    with pytest.raises(ValueError, match="divide the largest, 24, found 7"):
        every_nth(longest, tmp_path / "7", 7)


def test_pieces_of_a_run_are_of_one_machine_and_revision(tmp_path) -> None:
    out = tmp_path / "growth.json"
    first = header("benchmarks.growth", ["--only", "series"], smoke=True) | {"rows": [{"part": "series"}], "sizes": {}}
    out.write_text(json.dumps(first))
    now = header("benchmarks.growth", ["--only", "batch"], smoke=True)
    assert begin(out, None, now)["rows"] == []
    added = begin(out, "batch", now)
    assert added["rows"] == [{"part": "series"}]
    commands = "python -m benchmarks.growth --only series && python -m benchmarks.growth --only batch"
    assert added["command"] == commands
    out.write_text(json.dumps(added))
    assert begin(out, "batch", now)["command"] == commands
    for name, value in (("revision", "0"), ("machine", {}), ("smoke", False)):
        with pytest.raises(ValueError, match=f"its {name} is .* figures of one file are of one machine and revision"):
            begin(out, "batch", now | {name: value})


def test_it_refuses_before_anything_is_written(tmp_path, capsys) -> None:
    for words, message in (
        (["--slices", "50,120"], "divide the largest, 120, found [50]"),
        (["--batch", "4"], "at least two different numbers"),
    ):
        with pytest.raises(SystemExit):
            main(["--smoke", "--out", str(tmp_path / "out.json"), *words])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs(tmp_path) -> None:
    out, plots = tmp_path / "growth.json", tmp_path / "plots"
    subprocess.run([sys.executable, "-m", "benchmarks.growth", "--smoke", "--out", str(out)], cwd=ROOT, check=True)
    results = json.loads(out.read_text())
    expected = {
        "slices": ["inference", "preparation"],
        "series": ["index", "index again", "check", "preparation"],
        "volumes": ["evaluation", "pretraining"],
        "batch": ["pretraining step"],
        "workers": ["loader", "preparation"],
    }
    found = [(row["part"], row["x"], row["step"]) for row in results["rows"]]
    assert found == [(part, x, step) for part, steps in expected.items() for x in SMOKE[part] for step in steps]
    assert all(row["runs"] and min(row["runs"]) > 0 and row["peak_mb"]["median"] > 50 for row in results["rows"])
    text = report.section(results)
    report.plots(results, plots)
    for part in expected:
        assert f"(benchmarks/growth_{part}.png)" in text
        assert 5_000 < (plots / f"growth_{part}.png").stat().st_size < 60_000
    assert "files to probabilities" in report.headline(results)
    assert Path(plots / "growth_slices.png").read_bytes()[:4] == b"\x89PNG"
