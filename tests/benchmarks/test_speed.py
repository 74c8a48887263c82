# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark runs, measures every quantity, and its report says what its numbers say."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from benchmarks.common import MALLOC
from benchmarks.speed.__main__ import ABSOLUTE, _processes, allocator, main
from benchmarks.speed.inputs import Sizes, compress
from benchmarks.speed.report import TARGETS, as_text, headline, plots, section
from benchmarks.speed.rows import IN_MEMORY, ORIGINAL, OURS, PARTS, QUANTITIES, WITH_GRADIENT, rows, timed
from demo.dataset import Options, make_patient
from demo.dicom import write_series


def example() -> dict[str, Any]:
    """Results in which every comparison is twofold, but the memory, which is half."""
    measured: dict[str, dict[str, list[float]]] = {}
    for quantity in QUANTITIES:
        values = [1.0, 1.0, 1.0] if quantity.at_most and quantity.under else [2.0, 2.2, 1.8]
        other = [2.0, 2.0, 2.0] if quantity.at_most else [1.0, 1.0, 1.0]
        found = measured.setdefault(quantity.key, {})
        found.setdefault(quantity.over, values)
        if quantity.under:
            found.setdefault(quantity.under, other)
    return {
        "repeats": 3, "malloc": {"A": "1"},
        "inputs": {"size": 512, "dicom_slices": 300, "nifti_slices": 120, "epoch": 12},
        "machine": {"cpu": "a processor", "threads": "default (2)"}, "rows": rows(measured),
    }  # fmt: skip


def test_a_target_is_judged_by_the_median_of_ratios() -> None:
    found = rows({"step": {ORIGINAL: [2.0, 3.0, 3.0], WITH_GRADIENT: [4.0] * 3, OURS: [1.0, 2.0, 1.0]}})
    assert [(row["ratio"]["median"], row["reached"]) for row in found] == [(2.0, True), (4.0, True)]
    found = rows({"step": {ORIGINAL: [1.9, 3.0, 1.0], WITH_GRADIENT: [1.0] * 3, OURS: [1.0, 1.0, 1.0]}})
    assert [(row["ratio"]["median"], row["reached"]) for row in found] == [(1.9, False), (1.0, False)]


def test_low_targets_are_upper_bounds() -> None:
    peaks = {OURS: [600.0], ORIGINAL: [1000.0], WITH_GRADIENT: [900.0]}
    assert [row["reached"] for row in rows({"memory": peaks})] == [True, False]
    assert rows({"series": {OURS: [14.0, 16.0, 14.5]}})[0]["reached"] is True
    assert rows({"series": {OURS: [14.0, 16.0, 15.5]}})[0]["reached"] is False
    assert rows({"index": {OURS: [1.0]}})[0]["reached"] is None


def test_short_actions_are_timed_together() -> None:
    order: list[str] = []
    found = timed({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2, calls={"b": 3})
    assert "".join(order) == "abbb" * 3  # warm-up and two repeats
    assert [len(found[name]) for name in "ab"] == [2, 2]


def test_the_report_counts_what_is_missed() -> None:
    results = example()
    judged = [row for row in results["rows"] if row["reached"] is not None]
    missed = sum(not row["reached"] for row in judged)
    assert 0 < missed < len(judged)
    text = section(results)
    assert text.count("**MISSED**") == missed
    (told,) = re.findall(r"Rows that reach their target: ([^.]+(?:\.[^.]+)*?)\. The original", text)
    counts = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", told)]
    assert tuple(map(sum, zip(*counts, strict=True))) == (len(judged) - missed, len(judged))
    assert [title in told for title in TARGETS if title[0].isdigit()] == [True] * 5
    assert all(row["quantity"] in text for row in results["rows"])
    assert "Synthetic" in text
    better = copy.deepcopy(results)
    for row in better["rows"]:
        row["reached"] = None if row["reached"] is None else True
    assert "MISSED" not in section(better)


def test_crops_are_judged_by_what_the_network_takes() -> None:
    """The original's crops are float copies: views beside them are not the same work."""
    judged = [quantity.key for quantity in QUANTITIES if quantity.part == "crops" and quantity.at_least]
    assert judged == ["floats"]


def test_one_run_has_no_range() -> None:
    lines = as_text(rows({"memory": {OURS: [600.0], ORIGINAL: [1000.0], WITH_GRADIENT: [900.0]}})).splitlines()
    assert "| 0.600 | at most 0.65 | reached |" in lines[2]
    assert "(" not in lines[2]


def test_seconds_that_are_compared_with_nothing_are_under_the_default_malloc() -> None:
    absolute = {quantity.part for quantity in QUANTITIES if quantity.under is None}
    assert absolute == set(ABSOLUTE)
    assert not any(quantity.under for quantity in QUANTITIES if quantity.part in ABSOLUTE)
    for _, parts, _ in _processes(list(PARTS), smoke=False):
        assert allocator(parts) == ({} if set(parts) <= absolute else MALLOC)


def test_the_epoch_is_longer_than_what_its_workers_fetch_ahead(root) -> None:
    workers = json.loads((root / "bundles/voco2d_pretrain/configs/train.json").read_text())["num_workers"]
    assert Sizes().epoch > 2 * workers


def test_a_compressed_series_has_the_same_pixels(tmp_path) -> None:
    patient = make_patient(0, 0, Options(size=32, slices=8, series_per_patient=1.0))
    volume = patient.render()
    write_series(tmp_path / "dicom", volume.hu, volume.scan, 0, (1, 2, 3))
    compress(tmp_path / "dicom", tmp_path / "rle")
    for file in (tmp_path / "dicom").iterdir():
        plain, small = pydicom.dcmread(file), pydicom.dcmread(tmp_path / "rle" / file.name)
        assert (plain.file_meta.TransferSyntaxUID.is_compressed, small.file_meta.TransferSyntaxUID) == (
            False, RLELossless
        )  # fmt: skip
        assert np.array_equal(plain.pixel_array, small.pixel_array)


def test_every_part_is_in_one_table() -> None:
    parts = [part for parts in TARGETS.values() for part in parts]
    assert sorted(parts) == sorted(PARTS)


def test_the_headline_names_both_baselines_and_the_machine() -> None:
    text = headline(example())
    assert text.startswith(
        "Speed: the crops of a prepared volume, not augmented, come 2.0 times as fast as by the original's chain"
    )
    assert "MONAI's PersistentDataset" in text
    assert "at 50 % of its memory" in text
    assert "300 uncompressed DICOM slices become probabilities in 2.0 s; rows that reach" in text
    assert text.endswith("(a processor).")


def test_a_headline_of_what_is_slower_says_so() -> None:
    results = example()
    row = next(row for row in results["rows"] if IN_MEMORY in row["variants"])
    row["ratio"] = {"median": 0.25, "low": 0.2, "high": 0.3}
    assert "0.25 times as fast as from its CacheDataset" in headline(results)


@pytest.mark.parametrize("argv", [["--only", "step", "--out", "x.json"], ["--repeats", "0"], ["--only", "nothing"]])
def test_wrong_options_are_refused(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs(root, tmp_path) -> None:
    """Every quantity is measured; nothing here asks how fast it is."""
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["smoke"] is True
    assert [(row["part"], row["quantity"]) for row in results["rows"]] == [(q.part, q.name) for q in QUANTITIES]
    for row in results["rows"]:
        assert all(value > 0 for values in row["variants"].values() for value in values), row
    stages = {row["quantity"]: row["variants"][OURS] for row in results["rows"] if row["part"] == "series"}
    stages.pop("the same series, RLE compressed, to probabilities")
    whole = stages.pop("DICOM series, uncompressed, to probabilities")
    assert [sum(values) for values in zip(*stages.values(), strict=True)] == pytest.approx(whole, rel=1e-6)
    assert as_text(results["rows"]) in done.stdout
    plots(results, tmp_path / "plots")
    assert 5_000 < (tmp_path / "plots" / "speed.png").stat().st_size < 60_000
