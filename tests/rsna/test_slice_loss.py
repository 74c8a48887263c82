# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss on slices: against a loop, its masks, and nothing at all where its weight is 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.engines.utils import default_prepare_batch
from torch import nn

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.loss import InjuryLoss
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from bundles.rsna_cnn_lstm.scripts.slice_loss import (
    InjurySliceLoss,
    SeriesAndSlices,
    training_batch,
    training_loss,
    training_network,
)

TABLE = LabelTable.from_file(Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json")
WEIGHTS = ((0, 2.0), (1, 6.0))  # column of the logits and injury's weight: bowel, extravasation


class Pixels(nn.Module):
    """A backbone that counts its passes."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x.flatten(1))


def draw(seed: int, size: int = 3, slices: int = 5) -> tuple[tuple, tuple]:
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(size, 11, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(size, slices, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, 2, (size, 5), generator=generator)
    labels = torch.randint(-1, 2, (size, slices, 2), generator=generator).float()
    return (series, logits), (targets, labels)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.floats(0.01, 3))
def test_loss_is_that_of_a_loop(seed: int, size: int, slices: int, use_weights: bool, weight: float) -> None:
    predicted, target = draw(seed, size, slices)
    loss = training_loss(InjuryLoss(TABLE, use_weights=use_weights), weight)
    total = 0.0
    for b in range(size):
        for s in range(slices):
            for k, (column, injury) in enumerate(WEIGHTS):
                y, z = target[1][b, s, k].item(), predicted[1][b, s, column].item()
                if y >= 0:
                    cross_entropy = math.log1p(math.exp(-z if y else z))
                    total += cross_entropy * (injury if y and use_weights else 1.0)
    total /= size * slices
    found = loss(predicted, target)
    plain = InjuryLoss(TABLE, use_weights=use_weights)
    assert found.item() == pytest.approx(plain(predicted[0], target[0]).item() + weight * total, rel=1e-9)
    assert loss.last_terms["slices"].item() == pytest.approx(total, rel=1e-9)
    assert set(loss.last_terms) == {*TABLE.group_names, "slices"}
    assert not loss.last_terms["slices"].requires_grad


def test_unknown_slices_have_no_gradient_and_batches_add_up() -> None:
    predicted, target = draw(1, size=4)
    logits = predicted[1].clone().requires_grad_()
    loss = InjurySliceLoss(InjuryLoss(TABLE), 1.0)
    whole = loss.slice_term(logits, target[1])
    whole.backward()
    known = torch.zeros_like(logits, dtype=torch.bool)
    known[:, :, :2] = target[1] >= 0
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    halves = [loss.slice_term(predicted[1][i : i + 2], target[1][i : i + 2]) for i in (0, 2)]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item())
    assert loss.slice_term(predicted[1], torch.full_like(target[1], -1)).item() == 0


def test_columns_follow_a_selection_of_groups_and_half_precision_is_raised() -> None:
    table = TABLE.select(["extravasation", "liver"])
    loss = InjurySliceLoss(InjuryLoss(table), 1.0)
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([0.0, 1.0, -1.0]).expand(2, 3)[..., None]
    full = torch.zeros(2, 3, 11)
    full[..., 1] = logits[..., 0]
    both = torch.full((2, 3, 2), -1.0)
    both[..., 1:] = labels
    expected = InjurySliceLoss(InjuryLoss(TABLE), 1.0).slice_term(full, both)
    assert loss.slice_term(logits, labels).item() == pytest.approx(expected.item())
    assert loss.slice_term(logits.bfloat16(), labels).dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no group has slice labels \(image_level_name\): liver"):
        training_loss(InjuryLoss(TABLE.select(["liver"])), 0.5)
    for weight in (-1, math.nan, math.inf, "0.5", True):
        with pytest.raises(ValueError, match="slice_loss_weight: expected a number of at least 0"):
            training_loss(InjuryLoss(TABLE), weight)
    predicted, target = draw(0)
    with pytest.raises(
        ValueError, match=r"expected slice labels \(3, 5, 2\) \(batch, slices, groups\), got \(3, 4, 2\)"
    ):
        training_loss(InjuryLoss(TABLE), 1)(predicted, (target[0], target[1][:, :4]))


def test_weight_zero_is_training_as_it_was() -> None:
    network, loss = CNNLSTM(Pixels(), hidden_size=3), InjuryLoss(TABLE)
    assert training_network(network, 0) is network
    assert training_network(network, 0, torch.device("cpu")) is network
    assert training_loss(loss, 0) is loss
    assert training_batch(0) is default_prepare_batch


@pytest.mark.parametrize("slice_pool", ["max", "mean", "attention"])
def test_one_pass_of_the_backbone_gives_both(slice_pool: str) -> None:
    torch.manual_seed(0)
    network = CNNLSTM(Pixels(), hidden_size=3, slice_pool=slice_pool, dropout=0.0, normalise=False)
    module = training_network(network, 0.5, torch.device("cpu"))
    assert isinstance(module, SeriesAndSlices)
    x = torch.rand(2, 1, 8, 8, 6)
    series, slices = module.train()(x)
    assert network.backbone.calls == 1
    assert torch.equal(series, network(x))
    assert torch.equal(slices, network.slice_logits(x)[0])
    assert slices.shape == (2, 6, 11)
    assert torch.equal(module.eval()(x), network(x))  # validation and weights files know nothing of it
    assert not network.training
    assert {name.removeprefix("network.") for name in module.state_dict()} == set(network.state_dict())


def test_the_batch_has_both_targets() -> None:
    batch = {"image": torch.rand(2, 1), "label": torch.ones(2, 5), "slice_label": torch.zeros(2, 4, 2)}
    image, (label, slices) = training_batch(0.1)(batch, torch.device("cpu"))
    assert torch.equal(image, batch["image"])
    assert torch.equal(label, batch["label"])
    assert torch.equal(slices, batch["slice_label"])
