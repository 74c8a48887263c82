# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run goes on from any step, bit for bit; from damaged files, older ones, after a bad loss and on a full disk."""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from workflow.checkpoint import Checkpoints, WeightsSaver
from workflow.checkpoint_files import is_whole, numbered, save_tensors
from workflow.errors import NonFiniteError
from workflow.weights import WeightsError

from tests.workflow.small_training import BATCH, EPOCHS, ITEMS, assert_same, run

LENGTH = 4  # batches of an epoch
PARTS = ("network", "optimizer", "scheduler", "random", "iteration")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run that was never interrupted, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("steps")
    return run(folder, EPOCHS, every_steps=1, keep=99)[0], folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_any_step_bit_for_bit(steps, tmp_path, workers):
    expected, folder = steps
    assert [number for number, _ in numbered(folder)] == list(range(EPOCHS * LENGTH, 0, -1))
    # with workers: within an epoch, at its end, and one batch before it
    for done in range(1, EPOCHS * LENGTH) if workers == 0 else (2, 4, 7):
        found, _ = run(
            tmp_path / f"{done}", EPOCHS, str(folder / f"checkpoint_{done}.pt"), seed=99, workers=workers, every_steps=2
        )
        assert found["losses"] == expected["losses"][done:]
        assert found["reports"] == expected["reports"][done // LENGTH :]
        for part in PARTS:
            assert_same(found[part], expected[part], f"{part} from {done}")
        if workers == 0:
            within = (done // LENGTH) * ITEMS + (done % LENGTH) * BATCH
            assert found["seen"] == expected["seen"][within:]


@pytest.mark.parametrize("accumulation", [2, 3])
def test_no_checkpoint_falls_between_accumulated_gradients(tmp_path, accumulation):
    expected, _ = run(tmp_path / "whole", 2, total=2, accumulation=accumulation, every_steps=1, keep=99)
    found = sorted(number for number, _ in numbered(tmp_path / "whole"))
    assert found == sorted({*range(accumulation, LENGTH + 1, accumulation), LENGTH,
                            *range(LENGTH + accumulation, 2 * LENGTH + 1, accumulation), 2 * LENGTH})  # fmt: skip
    for done in found[:-1]:
        path = str(tmp_path / "whole" / f"checkpoint_{done}.pt")
        again, _ = run(tmp_path / f"{done}", 2, path, seed=9, total=2, accumulation=accumulation)
        for part in PARTS:
            assert_same(again[part], expected[part], f"{part} from {done}")


def test_save_every_steps_counts_steps_of_the_optimizer(tmp_path):
    run(tmp_path, 2, total=2, every_steps=3, keep=99)
    assert [number for number, _ in numbered(tmp_path)] == [8, 7, 4, 3]
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="save_every_steps: expected a number of steps from 1 on or null"):
            Checkpoints(str(tmp_path), {}, every_steps=wrong)


def test_another_batch_size_goes_on_at_the_epochs_boundary(steps, tmp_path, caplog):
    _, folder = steps
    found, trainer = run(tmp_path, EPOCHS, str(folder / "checkpoint_8.pt"), batch=1)
    assert "an epoch has 7 iterations of 1 samples, it had 4 of 2: iteration 8 is now 14" in caplog.text
    assert "lr_scheduler: t_total is 28, it was 16" in caplog.text
    assert found["seen"] == steps[0]["seen"][2 * ITEMS :]
    assert trainer.state.iteration == EPOCHS * 7
    assert found["scheduler"]["last_epoch"] == EPOCHS * 7
    assert int(found["network"]["teacher.n_averaged"]) == 1 + EPOCHS * 7  # the momentum ends where it would have
    assert names(tmp_path) == ["checkpoint_21.pt", "checkpoint_28.pt"]


def test_another_batch_size_within_an_epoch_repeats_what_is_no_whole_step(steps, tmp_path, caplog):
    _, folder = steps
    found, _ = run(tmp_path, 2, str(folder / "checkpoint_7.pt"), batch=4)  # one epoch and six samples
    assert "the last 2 of 6 samples of epoch 2 come again: a step has 4 samples now" in caplog.text
    assert found["seen"] == steps[0]["seen"][ITEMS + 4 : 2 * ITEMS]
    caplog.clear()
    found, _ = run(tmp_path / "other", 2, str(folder / "checkpoint_6.pt"), batch=4)
    assert "come again" not in caplog.text
    assert found["seen"] == steps[0]["seen"][ITEMS + 4 : 2 * ITEMS]


def test_latest_finds_the_branch_of_another_batch_size(steps, tmp_path):
    """Its iterations are fewer than those of the files that were there."""
    os.link(steps[1] / "checkpoint_8.pt", tmp_path / "checkpoint_8.pt")
    _, trainer = run(tmp_path, 3, "latest", batch=7)
    assert trainer.state.iteration == 3
    assert names(tmp_path) == ["checkpoint_2.pt", "checkpoint_3.pt", "checkpoint_8.pt.old"]
    assert run(tmp_path, 4, "latest", batch=7)[0]["iteration"] == 4


def test_other_data_starts_the_unfinished_epoch_again(steps, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tests.workflow.small_training.ITEMS", 8)
    found, _ = run(tmp_path, 2, str(steps[1] / "checkpoint_6.pt"))
    assert "there are 8 items, there were 7: epoch 2 starts again from its beginning" in caplog.text
    assert len(found["seen"]) == 8


def test_a_longer_run_and_another_rate_are_those_of_the_config(steps, tmp_path, caplog):
    """The schedule is what it would have been, had the run been started so."""
    found, _ = run(tmp_path, 5, str(steps[1] / "checkpoint_16.pt"), total=5, learning_rate=0.02)
    assert "optimizer: initial_lr is 0.02, it was 0.01" in caplog.text
    assert "lr_scheduler: t_total is 20, it was 16" in caplog.text
    straight, _ = run(tmp_path / "straight", 5, total=5, learning_rate=0.02)
    assert_same(found["scheduler"], straight["scheduler"])
    assert_same(found["optimizer"]["param_groups"], straight["optimizer"]["param_groups"])


def test_a_damaged_checkpoint_is_passed_over_by_name(steps, tmp_path, caplog):
    for number in (8, 9, 10):
        (tmp_path / f"checkpoint_{number}.pt").write_bytes((steps[1] / f"checkpoint_{number}.pt").read_bytes())
    (tmp_path / "checkpoint_notes.pt").touch()
    whole = (tmp_path / "checkpoint_10.pt").read_bytes()
    (tmp_path / "checkpoint_10.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray((tmp_path / "checkpoint_9.pt").read_bytes())
    weight = torch.load(tmp_path / "checkpoint_9.pt", weights_only=True)["network"]["student.projector.0.weight"]
    flipped[flipped.index(weight.numpy().tobytes())] ^= 1
    (tmp_path / "checkpoint_9.pt").write_bytes(flipped)
    found, _ = run(tmp_path, EPOCHS, "latest", seed=3)
    for number in (9, 10):
        assert f"checkpoint_{number}.pt is damaged, the disk may be too: trying the checkpoint before it" in caplog.text
    assert_same(found["network"], steps[0]["network"])
    assert names(tmp_path) == ["checkpoint_10.pt.old", "checkpoint_12.pt", "checkpoint_16.pt", "checkpoint_9.pt.old",
                               "checkpoint_notes.pt"]  # fmt: skip
    for _, path in numbered(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"none of the 2 checkpoints in .* is whole"):
        run(tmp_path, EPOCHS, "latest")


def test_latest_is_of_the_branch_that_was_gone_on_with(steps, tmp_path, caplog):
    for number in (4, 8, 12):
        os.link(steps[1] / f"checkpoint_{number}.pt", tmp_path / f"checkpoint_{number}.pt")
    branch, _ = run(tmp_path, 2, str(tmp_path / "checkpoint_4.pt"), learning_rate=0.001)
    for number in (8, 12):
        assert f"checkpoint_{number}.pt is later than where the run goes on: renamed to checkpoint_{number}.pt.old" in (
            caplog.text
        )
    assert names(tmp_path) == ["checkpoint_12.pt.old", "checkpoint_4.pt", "checkpoint_8.pt", "checkpoint_8.pt.old"]
    found, _ = run(tmp_path, 2, "latest", learning_rate=0.001)
    assert found["losses"] == []
    assert_same(found["network"], branch["network"])


def test_a_run_from_elsewhere_has_a_checkpoint_of_its_own_at_once(steps, tmp_path):
    elsewhere = steps[1] / "checkpoint_7.pt"
    found, _ = run(tmp_path, 1, str(elsewhere))  # nothing to do: stopped before its first step
    assert found["losses"] == []
    assert names(tmp_path) == ["checkpoint_7.pt"]
    assert_same(torch.load(tmp_path / "checkpoint_7.pt", weights_only=True), torch.load(elsewhere, weights_only=True))


def test_a_completed_run_says_that_there_is_nothing_left(steps, tmp_path, caplog):
    os.link(steps[1] / "checkpoint_16.pt", tmp_path / "checkpoint_16.pt")
    before = (tmp_path / "checkpoint_16.pt").stat().st_ino  # a file that is written has another
    with caplog.at_level(logging.INFO):
        assert run(tmp_path, EPOCHS, "latest")[0]["losses"] == []
    assert "nothing left to do: 4 of 4 epochs are done" in caplog.text
    assert (tmp_path / "checkpoint_16.pt").stat().st_ino == before


def test_a_checkpoint_of_another_network_is_an_explained_error(steps, tmp_path):
    content = torch.load(steps[1] / "checkpoint_4.pt", weights_only=True)
    del content["network"]["student.projector.0.weight"]
    save_tensors(tmp_path / "checkpoint_4.pt", content)
    with pytest.raises(WeightsError, match=r"(?s)checkpoint_4.pt: does not fit this run: .*student.projector.0.weight"):
        run(tmp_path, EPOCHS, "latest")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_loss_leaves_the_state_before_its_step(steps, tmp_path, accumulation):
    """Running statistics too, which the bad batch's forward pass has spoilt; with accumulation those of the step."""
    expected, _ = run(tmp_path / "good", 2, total=2, accumulation=accumulation, every_steps=1, keep=99)
    bad, step = expected["seen"][ITEMS + 3 * BATCH], LENGTH + {1: 3, 2: 2}[accumulation]
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "bad", 2, total=2, accumulation=accumulation, poison=bad)
    path = tmp_path / "bad" / f"checkpoint_{step}.rescued.pt"
    assert names(path.parent) == ["checkpoint_4.pt", path.name]
    assert str(caught.value).startswith(f"the loss is nan at iteration 8 (epoch 2), series ['series_{bad}']. The state")
    assert f"that step is in {path}: --resume latest goes on from it" in str(caught.value)
    found, good = (torch.load(f, weights_only=True) for f in (path, tmp_path / "good" / f"checkpoint_{step}.pt"))
    assert_same(found, good)
    again, _ = run(tmp_path / "bad", 2, "latest", total=2, accumulation=accumulation)
    assert_same(again["network"], expected["network"])
    assert "checkpoint_4.pt" in names(path.parent)


def test_a_rescue_removes_no_good_checkpoint(steps, tmp_path):
    bad = steps[0]["seen"][2 * ITEMS]
    with pytest.raises(NonFiniteError, match=r"checkpoint_8.pt: --resume latest"):  # it is there already
        run(tmp_path, EPOCHS, poison=bad, keep=2)
    assert names(tmp_path) == ["checkpoint_4.pt", "checkpoint_8.pt"]
    run(tmp_path, 3, "latest", keep=2)
    with pytest.raises(NonFiniteError, match=r"checkpoint_13.rescued.pt: --resume latest"):
        run(tmp_path, EPOCHS, "latest", poison=steps[0]["seen"][3 * ITEMS + BATCH], keep=2)
    assert names(tmp_path) == ["checkpoint_12.pt", "checkpoint_13.rescued.pt", "checkpoint_8.pt"]


def test_weights_that_are_bad_already_are_not_rescued(tmp_path):
    def step(engine: Engine, batch: int) -> None:
        network.weight.data.fill_(math.nan)
        raise NonFiniteError("the loss is nan")

    network = torch.nn.Linear(1, 1)
    engine = Engine(step)
    Checkpoints(str(tmp_path), {"network": network}).attach(engine)
    with pytest.raises(NonFiniteError, match=r"is not finite already \(network: weight\): it is not saved"):
        engine.run([0])
    assert names(tmp_path) == []


def test_a_file_that_is_named_is_checked_whole_too(steps, tmp_path):
    path = tmp_path / "checkpoint_9.pt"
    flipped = bytearray((steps[1] / path.name).read_bytes())
    weight = torch.load(steps[1] / path.name, weights_only=True)["network"]["student.projector.0.weight"]
    flipped[flipped.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(WeightsError, match=r"checkpoint_9.pt is damaged: its checksums"):
        run(tmp_path, EPOCHS, str(path))


def test_the_first_step_too_leaves_a_state(steps, tmp_path):
    with pytest.raises(NonFiniteError, match=r"at iteration 1 .*checkpoint_0.rescued.pt: --resume latest"):
        run(tmp_path, EPOCHS, poison=steps[0]["seen"][0])
    assert_same(run(tmp_path, EPOCHS, "latest", seed=3)[0]["network"], steps[0]["network"])


def test_other_errors_pass_through(tmp_path):
    def step(engine: Engine, batch: int) -> None:
        raise KeyError("x")

    engine = Engine(step)
    Checkpoints(str(tmp_path), {}).attach(engine)
    with pytest.raises(KeyError, match="x"):
        engine.run([0])
    assert names(tmp_path) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write beyond 20 kB into a file, as a full disk does in the middle of one."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_is_whole(steps, tmp_path, request):
    run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert all(len(content) > 25_000 for content in before.values())
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=r"checkpoint_12.pt could not be written: File too large .*make room there"):
        run(tmp_path, EPOCHS, "latest")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_same(run(tmp_path, EPOCHS, "latest")[0]["network"], steps[0]["network"])


def test_a_failure_of_torchs_writer_names_the_file(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("workflow.checkpoint.torch.save", fails)
    with pytest.raises(OSError, match=r"model.pt could not be written: PytorchStreamWriter failed"):
        save_tensors(tmp_path / "model.pt", {})
    assert names(tmp_path) == []


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    for name in ("checkpoint_3.pt.abc.tmp", "model.pt.x.tmp", "other.tmp"):
        (tmp_path / name).touch()
    save_tensors(tmp_path / "model.pt", {"a": torch.zeros(3)})
    assert names(tmp_path) == ["model.pt", "other.tmp"]
    assert is_whole(tmp_path / "model.pt")
    assert not is_whole(tmp_path / "other.tmp")
    assert not is_whole(tmp_path / "gone.pt")


@pytest.mark.parametrize("fault", ["", "gone", "another"])
def test_weights_that_are_not_the_checkpoints_are_written_again(tmp_path, fault, caplog):
    """By a later validation or an abandoned branch: else no value of this one might be better and theirs would stay."""
    module = torch.nn.Linear(1, 1)
    engine = Engine(lambda *_: None)
    engine.state.metrics = {"score": 2.0}
    saver = WeightsSaver(str(tmp_path / "model.pt"), module, metric="score")
    saver(engine)
    state = saver.state_dict()
    if fault:
        (tmp_path / "model.pt").unlink()
    if fault == "another":
        save_tensors(tmp_path / "model.pt", {"weight": torch.ones(1)})
    saver = WeightsSaver(str(tmp_path / "model.pt"), module, metric="score")
    saver.load_state_dict(state)
    assert saver.best == (-math.inf if fault else 2.0)
    warned = [record.levelno for record in caplog.records if "the next validation writes it" in record.message]
    assert (logging.WARNING in warned) == (fault == "gone")
