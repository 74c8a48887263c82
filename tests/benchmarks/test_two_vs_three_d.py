# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""2D beside 3D: the same positions are asked for, ratios are of the same round, and the whole benchmark at its
smallest."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.two_vs_three_d import gpu_report, report
from benchmarks.two_vs_three_d.__main__ import COMMON, SIZES, main, networks, tasks


@pytest.mark.parametrize("name", SIZES)
def test_the_grid_covers_the_volume_in_both(name: str) -> None:
    size = SIZES[name]
    for title, parts in networks(size).items():
        grid, crop = parts["settings"]["grid_size"], parts["settings"]["crop_size"]
        covered = [g * c for g, c in zip(grid, crop, strict=True)]
        assert covered == size["volume"][: len(grid)]
        assert len(grid) == int(title[0])
        assert grid[:2] == [3, 3]
        assert grid[2:] in ([], [1])  # nine positions: one in nine is chance for both
    assert size["slices"] <= size["volume"][2]


def test_rounds_take_turns_with_the_same_seed_for_all() -> None:
    plan = tasks(SIZES["small"], 2, "cpu", 5.0, COMMON)
    names = [*networks(SIZES["small"])]
    assert [(task["network"], task["settings"]["seed"]) for task in plan] == [(n, s) for s in (0, 1) for n in names]
    shared = [{k: v for k, v in t["settings"].items() if k not in ("crop_size", "grid_size")} for t in plan[:4]]
    assert all("num_slices" in one for one in shared[:2])
    assert shared[2] == shared[3]
    assert {k: v for k, v in shared[0].items() if k not in ("num_slices", "backbone_name")} == shared[2]


@pytest.mark.parametrize("side", [32, 64])
def test_both_resnets_look_at_feature_maps_of_the_same_side(side: int, root) -> None:
    import torch
    from monai.bundle import ConfigParser
    from networks.backbone import Backbone

    parts = networks(SIZES["small"])["3D ResNet-18"]
    parser = ConfigParser()
    configs = root / "bundles/voco2d_pretrain/configs"
    parser.read_config([configs / "train.json", configs / "train_3d.json"])
    for name, value in parts["replaced"].items():
        parser[name] = value
    three, maps = parser.get_parsed_content("network_def").eval(), []
    three.avgpool.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        three(torch.zeros(1, 1, side, side, side))
        two = Backbone("resnet18").eval().model.forward_features(torch.zeros(1, 1, side, side))
    assert maps[0].shape[2:4] == two.shape[2:] == (side // 32, side // 32)


def _rows() -> list[dict]:
    base = {"parameters": 1e6, "before_mb": 500.0, "steps": 3, "position_accuracy_untrained": 0.2}
    return [
        base | {"network": f"{k}D ResNet-18", "seed": seed, "training_mb": 1000.0 * k * (seed + 1),
                "gflop_per_volume": 2.0 * k, "step_seconds": {"median": k + seed, "low": 0, "high": 9},
                "volumes_per_second": 2 / (k + seed), "position_accuracy": 0.3 * (4 - k)}
        for seed in (1, 0) for k in (2, 3)
    ]  # fmt: skip


def test_ratios_are_of_the_same_round() -> None:
    results = {"rows": _rows()}
    found = report.ratios(results, "2D ResNet-18", "3D ResNet-18")
    assert found["memory"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert found["added"] == report.ratio([2500, 5500], [1500, 3500])  # 3D and 2D, each less its 500 before
    assert (found["time"]["low"], found["time"]["high"]) == (pytest.approx(4 / 3), pytest.approx(3 / 2))
    assert report.of_seeds(results, "3D ResNet-18", "step_seconds") == [3, 4]


def test_no_ratio_of_what_is_at_the_floor() -> None:
    rows = _rows()
    next(row for row in rows if row["network"].startswith("2D"))["training_mb"] = 500.5
    found = report.ratios({"rows": rows}, "2D ResNet-18", "3D ResNet-18")
    assert found["added"] is None
    assert found["memory"]["high"] > 1


def test_a_gpu_has_its_own_plot_and_machine() -> None:
    results = {
        "device": "cuda", "seconds": 60, "seeds": 2, "rows": _rows(), "sizes": SIZES["paper"], "common": COMMON,
        "machine": {"cpu": "a processor", "gpu": "a GPU"},
    }  # fmt: skip
    text = gpu_report.headline(results)
    assert "1.5 (1.5 to 1.5) times the peak memory" in text
    assert "2D-VoCo on 32 of 64 slices" in text
    assert "take position accuracy from 0.20 to 0.60 (0.60 to 0.60) in 2D" in text
    assert " in 2D and from 0.20 to 0.30 (0.30 to 0.30) in 3D (a GPU;" in text
    assert report.plot_name(results) == "two_vs_three_d_gpu.png"
    assert "--device cuda" in gpu_report.COMMAND
    assert gpu_report.TITLE != report.TITLE


def test_depthwise_convolutions_are_not_counted_as_full_ones() -> None:
    from types import SimpleNamespace

    import torch
    from torch import nn

    from benchmarks.two_vs_three_d.parts import flop

    class Two(nn.Module):  # student and teacher
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [layer(x) for layer in self.layers]

    pretraining = SimpleNamespace(network=Two(), prepare_batch=lambda batch, _: (batch, None), device=None)
    forward = 2 * 9 * 8 * 16 * 16  # multiply and add, kernel, channels, pixels
    assert flop(pretraining, torch.zeros(1, 8, 16, 16)) == 4 * forward  # student three times, teacher once


def test_the_missing_package_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.two_vs_three_d.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--smoke"])
    assert "needs the package einops: pip install einops" in capsys.readouterr().err


def test_the_swin_encoder_gives_a_vector() -> None:
    pytest.importorskip("einops")
    import torch

    from benchmarks.two_vs_three_d.encoders import SwinEncoder

    encoder = SwinEncoder(feature_size=12, window=4)
    assert encoder(torch.rand(2, 1, 16, 16, 16)).shape == (2, encoder.num_features)


@pytest.mark.slow
def test_it_runs_and_the_document_shows_it(tmp_path, root) -> None:
    assert importlib.util.find_spec("einops") is not None, "pip install -r requirements-dev.txt"
    file = tmp_path / "results.json"
    subprocess.run([sys.executable, "-m", "benchmarks.two_vs_three_d", "--smoke", "--out", file], cwd=root, check=True)
    results = json.loads(file.read_text())
    assert results["smoke"] is True
    assert report.networks(results) == [*networks(SIZES["smoke"])]
    for row in results["rows"]:
        assert row["training_mb"] >= row["before_mb"] > 100
        assert row["gflop_per_volume"] > 0
        assert 0 <= row["position_accuracy"] <= 1
        assert row["steps"] >= 1
    parameters = {row["network"]: row["parameters"] for row in results["rows"]}
    assert parameters["2D ResNet-18"] == pytest.approx(11.2e6, rel=0.02)
    assert parameters["3D ResNet-18"] == pytest.approx(33.1e6, rel=0.02)
    text = report.section(results)
    assert all(f"| {name} |" in text for name in report.networks(results))
    assert "2D sees 2 of the 8 slices" in text
    assert "MALLOC_MMAP_MAX_=0" in text
    for dimensions in ("2D", "3D"):
        rows = [row["position_baselines"] for row in results["rows"] if row["network"].startswith(dimensions)]
        assert rows[0] == rows[1]
        assert f"{rows[0]['chance']:.2f}, always the centre {rows[0]['centre']:.2f}" in text
    assert str(root) not in file.read_text()
    assert "ResNet-18" in report.headline(results)
    report.plots(results, tmp_path / "plots")
    assert 1000 < (tmp_path / "plots" / "two_vs_three_d.png").stat().st_size < 60_000
