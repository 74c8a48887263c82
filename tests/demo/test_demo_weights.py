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
from demo.cards import NOTICE, classifier_card, real_sources
from demo.run import Demo
from demo.weights import RSNA, VOCO, make_weights, real_series, write_half
from demo.work_folder import duration, write_stamp

CROPS = {"volume_size": [96, 96, 16], "crop_size": [32, 32], "num_slices": 2, "num_val_crops": 2, "hidden_size": 32}
SLICES = {"volume_size": [32, 32, 8], "image_size": [24, 24], "num_slices": 8}
TINY = {"PRETRAIN_SMALL": CROPS, "PRETRAIN": CROPS, "HEALTH": CROPS, "FINE_TUNE_SMALL": SLICES,
        "FINE_TUNE_MEDIUM": SLICES, "FINE_TUNE": SLICES, "FINE_TUNE_HEAD": SLICES, "EVALUATE": SLICES}  # fmt: skip


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
    assert f"network tensors loaded from {work / 'runs' / 'fine_tune_medium' / 'model.pt'}" in log
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
    assert duration(tmp_path).startswith("at least ")


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


def test_what_is_not_better_than_chance_is_said_so(tmp_path: Path) -> None:
    """The score by its paired difference, whatever its own interval; an AUC by its interval; mAP not at all."""
    file = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2)}, file)
    facts = {"tested": 4, "patients": 12, "seed": 0, "real": [], "versions": "x", "duration": "7 min", "command": "y"}

    def last_cells(difference: tuple[float, float, float]) -> dict[str, str]:
        interval = {"value": 0.75, "low": 0.70, "high": 0.80}
        aucs = {"bowel": (0.6, 0.51, 0.7), "liver": (0.6, 0.5, 0.7), "spleen": (None, None, None)}
        result = {
            "patients": 4, "score": interval, "mAP": {"value": 0.9, "low": 0.8, "high": 0.95},
            "auc": {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in aucs.items()},
            "baseline": {"score": 0.78, "mAP": 0.3,
                         "score_difference": dict(zip(("value", "low", "high"), difference, strict=True))},
        }  # fmt: skip
        rows = classifier_card(file, facts, result, file).split("|---|---|---|---|\n")[1].split("\n\n")[0]
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
        return {row[0]: row[-1] for row in cells}

    assert last_cells((-0.03, -0.05, -0.01)) == {
        "score (lower is better)": "yes", "score minus that of the frequencies": "", "mAP": "",
        "AUC bowel": "yes", "AUC liver": "not shown",
    }  # fmt: skip
    assert last_cells((-0.03, -0.05, 0.0))["score (lower is better)"] == "not shown"


def test_another_command_is_refused_the_work_folder_of_a_first(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def stopped(_: Demo, stage: str, *words: object) -> None:
        ran.append(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "command", stopped)
    call = ["--work", str(tmp_path / "work"), "--models", str(tmp_path / "bundles")]

    def refused(*further: str) -> str:
        with pytest.raises(SystemExit):
            weights.main([*call, *further])
        return capsys.readouterr().err

    with pytest.raises(KeyboardInterrupt):
        weights.main(call)
    assert f"{tmp_path / 'work'} was begun with other settings: patients was 300, is 200. " in refused(
        "--patients", "200"
    )
    assert "seed was 0, is 1" in refused("--seed", "1")
    assert "data was [], is [" in refused("--data", str(data_dir / "cptac_pda_c3l_00189.nii.gz"))
    with monkeypatch.context() as changed:
        changed.setattr(weights, "FINE_TUNE", {**weights.FINE_TUNE, "max_epochs": 7})
        assert "fine_tune was {" in refused()
    assert ran == ["data"]
    (tmp_path / "work" / "settings.json").unlink()  # a folder of before there was one is taken as it is
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            weights.main([*call, "--patients", "200"])
    assert "patients was 200, is 300" in refused()


def test_the_card_says_what_was_run_and_how_long_it_took(tmp_path: Path) -> None:
    defaults = {"patients": 300, "tested": 100, "seed": 0}
    assert weights.command(defaults, [], [], {}) == "make weights"
    said = weights.command({**defaults, "seed": 3}, [Path("/somewhere/own ct")], [], {})
    assert said == "python -m demo.weights --seed 3 --data 'own ct'"
    said = weights.command(defaults, [], ["--size", 48], {"pool": "avg"})
    assert said == "make weights (--size 48; pool avg)"
    write_stamp(tmp_path, "data", 54.4)
    write_stamp(tmp_path, "pretrain", 665.6)
    assert (tmp_path / "stamps" / "data").read_text() == "54 s\n"  # as those of before
    assert duration(tmp_path) == "12 min"
    write_stamp(tmp_path, "fine_tune", 60, resumed=True)
    assert duration(tmp_path) == "at least 13 min"
