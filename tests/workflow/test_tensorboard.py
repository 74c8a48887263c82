# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's files: none before the first value, learning rates, settings beside final figures."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import TensorBoardStatsHandler
from pydicom.uid import generate_uid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from workflow.privacy import pseudonym
from workflow.run import RunFolder
from workflow.tensorboard import HyperParameters, LazyWriter, LearningRates


def events(folder: Path) -> list[EventAccumulator]:
    """The files in the order in which they were begun: a name ends with its second, host, process and a running number,
    and as text 10 comes before 9."""
    files = sorted(folder.iterdir(), key=lambda file: int(file.name.rpartition(".")[2]))
    return [EventAccumulator(str(file)).Reload() for file in files]


def test_nothing_is_written_before_the_first_value(tmp_path):
    writer = LazyWriter(str(tmp_path / "tensorboard"))
    TensorBoardStatsHandler(summary_writer=writer).attach(Engine(lambda engine, batch: None))
    assert copy.deepcopy(writer)._writer is pickle.loads(pickle.dumps(writer))._writer is None
    with pytest.raises(AttributeError):
        writer.__no_such__  # noqa: B018
    assert not (tmp_path / "tensorboard").exists()
    writer.add_scalar("a", 1.0, 1)
    writer.flush()
    assert events(tmp_path / "tensorboard")[0].Scalars("a")[0].value == 1.0


def hparams(file: EventAccumulator) -> Any:
    data = HParamsPluginData.FromString(file.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    return data.session_start_info.hparams


@pytest.mark.parametrize("anonymise", [True, False])
def test_settings_hold_no_uid_on_request(tmp_path, anonymise):
    uid = generate_uid()
    run = RunFolder(tmp_path, "a", anonymise=anonymise)
    run.config = {"dataset_dir": f"/data/{uid}", "exclude": [f"{uid}/*"], "seed": 5, "amp": False}
    engine = Engine(lambda engine, batch: None)
    HyperParameters(run, LazyWriter(run.tensorboard)).attach(engine)
    engine.run([0])
    assert any(uid.encode() in file.read_bytes() for file in Path(run.tensorboard).iterdir()) is not anonymise
    settings = hparams(events(Path(run.tensorboard))[-1])
    name = f"uid-{pseudonym(uid)}" if anonymise else uid
    assert settings["dataset_dir"].string_value == f"/data/{name}"
    assert (settings["seed"].number_value, settings["amp"].bool_value) == (5.0, False)


def test_learning_rates_and_settings_with_the_final_figures(tmp_path):
    run = RunFolder(tmp_path, "a")
    run.config = {"_desc_": {}, "max_epochs": 2, "window": [-175, 250], "resume": None, "run": ["$1"]}
    run.metrics = {"score": 0.25, "nothing": None}
    writer = LazyWriter(run.tensorboard)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)]
    optimizer = torch.optim.SGD(groups)
    engine = Engine(lambda engine, batch: {"loss": 1.0})
    LearningRates(writer, optimizer).attach(engine)
    HyperParameters(run, writer).attach(engine)
    engine.add_event_handler("EPOCH_COMPLETED", lambda e: e.state.metrics.update(loss=float(e.state.epoch)))
    engine.add_event_handler("EPOCH_COMPLETED", lambda e: optimizer.param_groups[0].update(lr=0.05))
    engine.run([0, 0], max_epochs=2)
    curves, final = events(Path(run.tensorboard))
    assert [round(e.value, 6) for e in curves.Scalars("lr/group_0")] == [0.1, 0.1, 0.05, 0.05]
    assert [e.step for e in curves.Scalars("lr/group_1")] == [1, 2, 3, 4]
    assert {tag: final.Scalars(tag)[0].value for tag in final.Tags()["scalars"]} == {
        "final/score": 0.25,
        "final/loss": 2.0,
    }
    settings = hparams(final)
    assert set(settings) == {"max_epochs", "window", "resume"}
    assert (settings["max_epochs"].number_value, settings["window"].string_value) == (2.0, "[-175, 250]")
