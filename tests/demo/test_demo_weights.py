# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""`make weights`: all stages on tiny data, once each; half precision; what a card claims of its figures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from workflow.card import CARD, card_notice

from demo import weights
from demo.cards import NOTICE, real_sources, verdict
from demo.run import Demo
from demo.weights import RSNA, VOCO, make_weights, real_series, write_half

CROPS = {"volume_size": [96, 96, 16], "crop_size": [32, 32], "num_slices": 2, "num_val_crops": 2, "hidden_size": 32}
SLICES = {"volume_size": [32, 32, 8], "image_size": [24, 24], "num_slices": 8}
TINY = {"PRETRAIN_SMALL": CROPS, "PRETRAIN": CROPS, "HEALTH": CROPS, "FINE_TUNE_SMALL": SLICES, "FINE_TUNE": SLICES,
        "FINE_TUNE_HEAD": SLICES, "EVALUATE": SLICES}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, sizes in TINY.items():
        epochs = {} if name in ("HEALTH", "EVALUATE") else {"max_epochs": 1, "val_interval": 1}
        monkeypatch.setattr(weights, name, {**getattr(weights, name), **sizes, **epochs, "num_workers": 0})
    monkeypatch.setattr(weights, "REPEATS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_stage_is_done_once_and_the_files_have_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, models = tmp_path / "work", tmp_path / "bundles"
    arguments = {"patients": 12, "tested": 4, "options": ["--size", 48, "--slices", 10]}
    override = {"backbone_name": "test_efficientnet"}
    make_weights(work, models, **arguments, override=override)
    written = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert {str(path.relative_to(models)) for path in written} == {
        f"{name}/models/{file}" for name in (VOCO, RSNA) for file in ("model.pt", CARD)
    }
    for name in (VOCO, RSNA):
        assert card_notice(models / name / "models" / "model.pt") == NOTICE
        assert "LIDC-IDRI-0001 of LIDC-IDRI" in (models / name / "models" / CARD).read_text(encoding="utf-8")
    log = (work / "runs" / "fine_tune" / "log.txt").read_text(encoding="utf-8")
    assert f"network tensors loaded from {work / 'runs' / 'fine_tune_small' / 'model.pt'}" in log
    monkeypatch.setattr(Demo, "command", lambda *a: pytest.fail("a finished stage ran again"))
    make_weights(work, models, **arguments, override=override)
    assert {path: path.read_bytes() for path in written} == written


def test_a_stage_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, object]] = []

    def stopped(demo: Demo, *names: object, **overrides: object) -> None:
        said.append(overrides)
        (demo.runs / "pretrain").mkdir(parents=True, exist_ok=True)
        if len(said) == 1:
            raise subprocess.CalledProcessError(-9, "train")

    monkeypatch.setattr(Demo, "bundle", stopped)
    demo = weights.Weights(tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        demo.train("pretrain", VOCO, max_epochs=1)
    for _ in range(2):
        assert demo.train("pretrain", VOCO, max_epochs=1) == tmp_path / "runs" / "pretrain" / "model.pt"
    assert [overrides.get("resume") for overrides in said] == [None, "latest"]


def test_half_precision_keeps_counts_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "count": torch.tensor(70000)}, tmp_path / "a.pt")
    state = torch.load(write_half(tmp_path / "a.pt", tmp_path / "half" / "a.pt"), weights_only=True)
    assert (state["a"].dtype, state["count"].item()) == (torch.float16, 70000)
    torch.save({"a": torch.full((2,), 70000.0)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: not finite in half precision: a"):
        write_half(tmp_path / "b.pt", tmp_path / "half" / "b.pt")
    assert not (tmp_path / "half" / "b.pt").exists()


def test_real_series_are_those_without_masks_and_each_has_its_source(data_dir: Path) -> None:
    found = real_series([data_dir])
    assert len(found) == 4
    assert not [path for path in found if "organs" in path.name]
    assert all("CC BY" in line for line in real_sources(found))
    (line,) = real_sources([Path("/somewhere/own.nii.gz")])
    assert line.startswith("- `own.nii.gz`: own data, whose source and licence have to be stated")


def test_what_is_not_better_than_chance_is_said_so() -> None:
    assert verdict({"low": 0.51, "high": 0.6}, "0.500", lower=False) == "yes"
    assert verdict({"low": 0.49, "high": 0.6}, "0.500", lower=False) == "not shown"
    assert verdict({"low": 0.6, "high": 0.7}, "0.783", lower=True) == "yes"
    assert verdict({"low": 0.6, "high": 0.8}, "0.783", lower=True) == "not shown"
