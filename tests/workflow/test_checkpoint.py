# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on as if it had not been; a file is whole or the last one."""

from __future__ import annotations

import errno
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from workflow.checkpoint import Checkpoints, WeightsSaver
from workflow.checkpoint_files import newest_checkpoint
from workflow.progress import RandomState
from workflow.weights import WeightsError, read_weights

from tests.workflow.small_training import EPOCHS, ITEMS, Cnn, assert_same, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, EPOCHS)[0], folder


@pytest.mark.parametrize("how", ["latest", "file"])
def test_two_epochs_and_two_more_equal_four_bit_for_bit(tmp_path, whole, how):
    expected, _ = whole
    first, _ = run(tmp_path, 2)
    resume = "latest" if how == "latest" else str(tmp_path / "checkpoint_8.pt")
    found, trainer = run(tmp_path, EPOCHS, resume=resume, seed=99)  # another seed: all comes from the checkpoint
    assert first["losses"] == expected["losses"][:8]
    assert found["losses"] == expected["losses"][8:]
    assert [number // ITEMS for number in expected["seen"]] == [epoch for epoch in range(EPOCHS) for _ in range(ITEMS)]
    assert found["seen"] == expected["seen"][2 * ITEMS :]
    assert found["iteration"] == EPOCHS * 4
    assert trainer.state.max_epochs == EPOCHS
    assert int(found["network"]["teacher.n_averaged"]) == 1 + EPOCHS * 4
    for part in ("network", "optimizer", "scheduler", "random"):
        assert_same(found[part], expected[part], part)


def test_without_the_checkpoint_it_would_differ(whole):
    assert run(whole[1].parent / "other", EPOCHS, seed=99)[0]["losses"] != whole[0]["losses"]


def test_a_completed_run_has_nothing_more_to_do(tmp_path, whole):
    run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found, trainer = run(tmp_path, 2, resume="latest")
    assert found["losses"] == []
    assert trainer.state.epoch == 2
    assert set(before) == {path.name for path in tmp_path.iterdir()}


def test_only_the_last_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole[1].iterdir()) == ["checkpoint_12.pt", "checkpoint_16.pt"]
    assert newest_checkpoint(whole[1]).name == "checkpoint_16.pt"


def test_a_checkpoint_holds_nothing_that_only_pickle_can_read(whole):
    content = torch.load(newest_checkpoint(whole[1]), weights_only=True)
    assert set(content) == {"network", "optimizer", "lr_scheduler", "loss_means", "progress", "scaler", "random"}


def test_the_newest_checkpoint_is_that_of_the_highest_iteration(tmp_path):
    for name in ("checkpoint_9.pt", "checkpoint_100.pt", "checkpoint_20.pt", "model.pt"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path).name == "checkpoint_100.pt"
    with pytest.raises(FileNotFoundError, match=r"resume: no checkpoint in .*none"):
        newest_checkpoint(tmp_path / "none")


def test_resuming_from_a_wrong_file_is_an_explained_error(tmp_path, whole):
    wrong = tmp_path / "model.pt"
    torch.save(Cnn().state_dict(), wrong)
    with pytest.raises(WeightsError, match=r"model.pt: is no full checkpoint .* lacks \['loss_means', 'lr_scheduler'"):
        run(tmp_path, 1, resume=str(wrong))
    torch.save([1, 2], wrong)
    with pytest.raises(WeightsError, match=r"model.pt: is no full checkpoint"):
        run(tmp_path, 1, resume=str(wrong))
    for content in (b"no checkpoint", b"", newest_checkpoint(whole[1]).read_bytes()[:500]):
        wrong.write_bytes(content)
        with pytest.raises(WeightsError, match=r"model.pt: (not readable as a weights file|refused)"):
            run(tmp_path, 1, resume=str(wrong))
    with pytest.raises(WeightsError, match=r"gone.pt: not readable"):
        run(tmp_path, 1, resume=str(tmp_path / "gone.pt"))


def test_a_run_that_stopped_before_its_first_checkpoint_starts_from_the_beginning(whole, tmp_path, caplog):
    """With --resume latest: its folder is there, and its name taken."""
    found, _ = run(tmp_path, EPOCHS, resume="latest")
    assert f"no checkpoint in {tmp_path} yet: the run starts from the beginning" in caplog.text
    assert found["losses"] == whole[0]["losses"]


def half_written(content: object, file: Any, *args: object, **kwargs: object) -> None:
    """torch.save on a disk that fills up."""
    file.write(b"half of a checkp")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_killed_while_it_saves_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, whole):
    run(tmp_path, 2)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("workflow.checkpoint.torch.save", half_written)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, EPOCHS, resume="latest")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good
    assert run(tmp_path, EPOCHS, resume="latest")[0]["losses"] == whole[0]["losses"][8:]


def test_interval_and_completion_decide_when_to_save(tmp_path):
    engine = Engine(lambda *_: None)
    Checkpoints(str(tmp_path), {}, interval=2, keep=9).attach(engine)
    engine.run([0, 1], max_epochs=5)
    assert sorted(int(path.stem.rsplit("_", 1)[1]) for path in tmp_path.iterdir()) == [4, 8, 10]


def test_random_state_covers_every_generator():
    def draw() -> list:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]  # noqa: NPY002

    np.random.randn()  # noqa: NPY002 - one Gaussian is kept for the next call
    state = RandomState().state_dict()
    first = draw()
    assert draw() != first
    RandomState().load_state_dict(state)
    assert draw() == first


def evaluator(values: list[float]) -> Engine:
    """An engine whose metric takes these values, epoch by epoch."""
    engine = Engine(lambda *_: None)
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=torch.tensor(values[e.state.epoch - 1]))
    )
    return engine


def marked(values: list[float], path: Path, **options: Any) -> list[float]:
    """Epochs at which the file was written; the weight is the number of the epoch."""
    module = nn.Linear(1, 1, bias=False)
    engine, written = evaluator(values), []
    saver = WeightsSaver(str(path), module, **options)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: module.weight.data.fill_(e.state.epoch))
    saver.attach(engine)

    def look(e: Engine) -> None:
        if path.exists() and (not written or read_weights(path)["weight"].item() != written[-1]):
            written.append(read_weights(path)["weight"].item())

    engine.add_event_handler(Events.EPOCH_COMPLETED, look)
    engine.run([0], max_epochs=len(values))
    return written


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"metric": "score"}, [2, 4]),
        ({"metric": "score", "greater_is_better": False}, [2, 3, 6]),
        ({}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_best_weights_are_kept_and_nan_is_never_the_best(tmp_path, options, epochs):
    assert marked([math.nan, 2.0, 1.0, 3.0, math.nan, -4.0], tmp_path / "new" / "model.pt", **options) == epochs


def test_the_best_value_survives_a_resume(tmp_path):
    saver = WeightsSaver(str(tmp_path / "model.pt"), nn.Linear(1, 1), metric="score")
    saver.load_state_dict({"best": 5.0, "crc32": None})
    engine = evaluator([4.0, 6.0])
    saver.attach(engine)
    engine.run([0], max_epochs=1)
    assert not (tmp_path / "model.pt").exists()
    engine.run([0], max_epochs=2)
    assert (tmp_path / "model.pt").exists()
    assert saver.state_dict()["best"] == 6.0


def test_the_weights_file_is_flat_and_atomic(tmp_path, monkeypatch):
    module = Cnn()
    saver = WeightsSaver(str(tmp_path / "model.pt"), module)
    saver(Engine(lambda *_: None))
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_same(dict(found), {name: tensor.detach() for name, tensor in module.state_dict().items()})
    before = (tmp_path / "model.pt").read_bytes()
    monkeypatch.setattr("workflow.checkpoint.torch.save", half_written)
    with pytest.raises(OSError, match="No space left"):
        saver(Engine(lambda *_: None))
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
