# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a GPU: refused without one, crops cut on the device are the loader's, statements, and it works."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from monai.transforms import Compose, SelectItemsd
from transforms.voco import RandVoCoCrop, RandVoCoCropd
from workflow.dataset import collate_plain

from benchmarks.common import ROOT, header
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, report
from benchmarks.gpu.__main__ import FULL, MEANING, SMOKE, main
from benchmarks.gpu.parts import COMPILED, DEFAULT, EAGER, FASTEST, SKIPPED, VARIANTS, DeviceCrops

SETTINGS = {"grid_size": (3, 3), "crop_size": (8, 8), "num_random_crops": 2}


def results_of(seconds: dict[str, float]) -> dict:
    """Results whose variants take so long."""
    found = {name: {"runs": [value, value], "peak_mb": 1000.0} for name, value in seconds.items()}
    found[COMPILED] = {"failed": "RuntimeError: no compiler"}
    steps = {"variants": found, "flop": 32_000_000, "batch_size": 16}
    peaks = {"flop_per_second": {"fp32": 1e9, "tf32": 4e9, "bf16": 8e9}, "cudnn_allows_tf32": True}
    loader = {"no data": [1.0, 1.0], "crops by the loader": [1.2, 1.3], "crops on the device": [1.05, 1.05]}
    inference = {"decoding": [3.0], "preprocessing": [0.5], "without decoding": [2.5]}
    return header("benchmarks.gpu", [], True) | {
        "options": SMOKE, "peaks": peaks, "pretraining": steps, "classifier": steps,
        "loader": {"runs": loader, "volumes": 60, "workers": 8},
        "inference": {"runs": inference, "slices": 300},
    }  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--device", "cpu"], ["--smoke"]])
def test_it_is_refused_without_a_gpu(words, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        main(words)
    assert refusal.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "CUDA device" in message
    assert "--smoke" in message


def test_crops_cut_on_the_device_are_those_of_the_loader() -> None:
    generator = torch.Generator().manual_seed(0)
    slabs = [torch.randint(0, 256, (4, 1, 24, 24), dtype=torch.uint8, generator=generator) for _ in range(3)]
    ahead = Compose([RandVoCoCropd("image", **SETTINGS), SelectItemsd(["random_crops", "base_crops", "overlap"])])
    ahead.set_random_state(seed=7)
    expected = collate_plain([ahead({"image": slab}) for slab in slabs])
    cutter = RandVoCoCrop(**SETTINGS)
    cutter.R = ahead.set_random_state(seed=7).transforms[0].cropper.R
    cut = DeviceCrops(cutter, torch.device("cpu"))
    found = cut({"image": torch.stack(slabs), "series_id": ["a", "b", "c"]})
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert found["series_id"] == ["a", "b", "c"]


def test_what_is_said_follows_from_the_figures() -> None:
    seconds = dict.fromkeys(VARIANTS, 0.02) | {EAGER: 0.08, DEFAULT: 0.04}
    text = report.section(results_of(seconds))
    # 32 MFLOP in 0.08 s are 0.4 GFLOP/s of 4 (TF32); in 0.02 s 1.6 of 8 (bf16)
    line = "| fp32, contiguous | 80.0 (80.0 to 80.0) | 200.0 (200.0 to 200.0) | 1.00 (1.00 to 1.00) | 10.0 % | 1,000 |"
    assert line in text
    assert f"| {FASTEST} | 20.0 (20.0 to 20.0) | 800.0 (800.0 to 800.0) | 4.00 (4.00 to 4.00) | 20.0 % |" in text
    assert f"| {COMPILED} | failed: RuntimeError: no compiler |" in text
    assert f"default, {DEFAULT}: 2.00 (2.00 to 2.00) times eager fp32 (target: at least 2): reached" in text
    assert (
        f"- {DEFAULT} is the config's default on CUDA; fastest: fp32, channels_last, 2.00 (2.00 to 2.00) times" in text
    )
    assert "- crops by the loader: 1.25 times the epoch without loading (target: at most 1.10): **MISSED**" in text
    assert "- crops on the device: 1.05 times the epoch without loading (target: at most 1.10): reached" in text
    assert "- without decoding 2.50 s (target for 300 slices: at most 2 s): **MISSED**" in text
    slow = report.section(results_of(dict.fromkeys(VARIANTS, 0.05) | {EAGER: 0.08, DEFAULT: 0.045}))
    assert "1.78 (1.78 to 1.78) times eager fp32 (target: at least 2): **MISSED**" in slow
    assert "it is the fastest" in slow


def test_the_default_config_is_judged_and_not_the_fastest() -> None:
    results = results_of(dict.fromkeys(VARIANTS, 0.02) | {EAGER: 0.08, DEFAULT: 0.05})
    results["pretraining"]["variants"][COMPILED] = {"runs": [0.01, 0.01], "peak_mb": 1000.0}
    text = report.section(results)
    assert f"default, {DEFAULT}: 1.60 (1.60 to 1.60) times eager fp32 (target: at least 2): **MISSED**" in text
    assert f"fastest: {COMPILED}, 5.00 (5.00 to 5.00) times as fast" in text
    expected = f"GPU: pretraining by the default config ({DEFAULT}) at 320 volumes a second, 1.6 times eager fp32"
    assert report.headline(results).startswith(expected)


@pytest.mark.parametrize("lost", [EAGER, DEFAULT, None])
def test_a_variant_or_a_part_that_failed_leaves_a_report(lost: str | None, tmp_path) -> None:
    results = results_of(dict.fromkeys(VARIANTS, 0.02))
    for name in VARIANTS if lost is None else [lost]:
        results["pretraining"]["variants"][name] = {"failed": "OutOfMemoryError: all of it"}
    if lost is None:
        results["pretraining"]["flop"] = None
    text = report.section(results)
    assert f"| {lost or EAGER} | failed: OutOfMemoryError: all of it |" in text
    assert f"default, {DEFAULT}: unknown times eager fp32 (target: at least 2): unknown, one of both failed" in text
    told = report.headline(results)
    assert told is None if lost != EAGER else "at 800 volumes a second (" in told
    report.plots(results, tmp_path)
    for part in ("peaks", "pretraining", "loader", "classifier", "inference"):
        ended = {name: value for name, value in results.items() if name != part}
        assert report.section(ended).count("**Unmeasured**") == (part != "peaks")
        report.headline(ended)
        report.plots(ended, tmp_path)


class Failing:
    """Steps that fail at a certain call, by variant."""

    def __init__(self, task: dict, variant: dict) -> None:
        self.name = next(name for name, options in VARIANTS.items() if options is variant)
        self.compiled, self.calls = False, 0
        if self.name == EAGER:
            raise torch.OutOfMemoryError("no room for the weights\nand more")

    def resident(self) -> dict:
        return {"image": torch.ones(4, 4)}

    def step(self, batch: dict) -> None:
        batch["image"] @ batch["image"]

    def run(self, batches: list) -> None:
        self.calls += 1
        if self.name == FASTEST and self.calls == 3:  # first is the trial, second the warm-up
            raise torch.OutOfMemoryError("fragments")


def test_a_variant_that_fails_leaves_the_others_measured(monkeypatch) -> None:
    monkeypatch.setattr(parts, "Steps", Failing)
    task = {"overrides": {"device": "cpu", "batch_size": 2}, "steps": 1, "repeats": 3,
            "variants": [EAGER, FASTEST, DEFAULT]}  # fmt: skip
    found = parts.steps(task)
    assert found["variants"][EAGER] == {"failed": "OutOfMemoryError: no room for the weights"}
    assert found["variants"][FASTEST] == {"failed": "OutOfMemoryError: fragments"}
    assert len(found["variants"][DEFAULT]["runs"]) == 3
    assert found["flop"] == 2 * 4**3
    assert parts.steps(task | {"variants": [EAGER]})["flop"] is None


def test_a_part_that_fails_leaves_those_before_it(monkeypatch, tmp_path) -> None:
    def in_bundle(bundle: str, function: str, task: dict) -> dict:
        if function.endswith(":stall"):
            raise RuntimeError("ended")
        return {"of": function}

    monkeypatch.setattr(gpu, "in_bundle", in_bundle)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "header", lambda *_: {})
    words = ["--out", str(tmp_path / "gpu.json"), "--volumes", "1", "--slices", "8", "--size", "32"]
    with pytest.raises(RuntimeError, match="ended"):
        main(words)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {"peaks", "pretraining"} <= set(results)
    assert not {"loader", "classifier", "inference"} & set(results)


def test_every_option_has_its_line() -> None:
    assert set(FULL) == set(SMOKE) == set(MEANING)


@pytest.mark.slow
def test_it_works_on_a_cpu(tmp_path) -> None:
    out, plots = tmp_path / "gpu.json", tmp_path / "plots"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--device", "cpu", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads(out.read_text())
    assert results["smoke"] is True
    assert list(results["pretraining"]["variants"]) == list(VARIANTS)
    assert results["pretraining"]["variants"][COMPILED] == {"failed": SKIPPED}
    assert all("runs" in results["pretraining"]["variants"][name] for name in VARIANTS if name != COMPILED)
    assert list(results["classifier"]["variants"]) == [EAGER, FASTEST, DEFAULT]
    assert results["pretraining"]["flop"] > 1e6
    assert results["loader"]["volumes"] == SMOKE["epoch_volumes"]
    assert results["inference"]["slices"] == SMOKE["slices"]
    text = report.section(results)
    report.plots(results, plots)
    assert f"(benchmarks/{report.PLOT})" in text
    assert 5_000 < (plots / report.PLOT).stat().st_size < 60_000
    assert "GPU: pretraining by the default config" in report.headline(results)
