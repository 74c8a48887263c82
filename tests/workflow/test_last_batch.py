# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A last batch of one volume is a step like any other, in both stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn
from workflow.training import LossMeans, StopAtNonFiniteLoss

from bundles.rsna_cnn_lstm.scripts.loss import InjuryLoss
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from tests.workflow.small_training import ITEMS, run

LABELS_FILE = Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json"


def test_pretraining_has_no_partner_for_it(tmp_path, monkeypatch):
    """BN of the projector acts over its crops; the term between volumes is 0 and the others train."""
    found, _ = run(tmp_path / "seven", 1, total=1, batch=3)
    assert [len(found["seen"]), ITEMS % 3] == [7, 1]
    monkeypatch.setattr("tests.workflow.small_training.ITEMS", 1)
    found, _ = run(tmp_path / "one", 1, total=1, batch=3)
    assert len(found["losses"]) == 1
    assert found["reports"][0]["loss_inter"] == 0.0
    assert found["reports"][0]["loss_intra"] > 0.0
    assert all(tensor.isfinite().all() for tensor in found["network"].values())
    moved = found["optimizer"]["state"].values()
    assert sum(state["exp_avg"].abs().sum() > 0 for state in moved) > 4


class Cnn(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(dim=(2, 3))


@pytest.mark.parametrize("slice_pool", ["max", "mean", "attention"])
def test_the_classifiers_bn_has_its_slices(slice_pool):
    torch.manual_seed(0)
    network, loss = CNNLSTM(Cnn(), hidden_size=3, slice_pool=slice_pool), InjuryLoss(LABELS_FILE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    batches = [{"image": torch.rand(1, 1, 8, 8, 5), "label": torch.tensor([[0, 1, 2, 0, 1]]), "series_id": ["s"]}]
    means = LossMeans(loss)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        decollate=False,
        train_handlers=[StopAtNonFiniteLoss(optimizer), means],
    )
    trainer.run()
    assert trainer.state.metrics["loss"] > 0
    after = network.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert not torch.equal(before["backbone.layers.0.weight"], after["backbone.layers.0.weight"])
