# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Flips and several weights files: the mean of logits, by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from workflow.weights import WeightsError

from bundles.rsna_cnn_lstm.scripts.ensemble import EnsembleInferer


class Toy(nn.Module):
    """Logits of a volume [B, 1, X, Y, S]: weighted sums that feel a flip unless the weights are symmetric."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed)))
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(torch.einsum("bcxys,lxy->bl", image, self.weight))


def image(batch: int = 3) -> Tensor:
    return torch.rand(batch, 1, 6, 4, 5, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A flat file, and a full checkpoint as a training run keeps it."""
    torch.save(Toy(1).state_dict(), tmp_path / "model.pt")
    torch.save({"network": Toy(2).state_dict(), "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "checkpoint_7.pt")
    return [str(tmp_path / "model.pt"), str(tmp_path / "checkpoint_7.pt")]


def loaded(weights: object, flips: object = ()) -> tuple[EnsembleInferer, nn.Module]:
    network = Toy().eval()
    inferer = EnsembleInferer(network, weights, flips)
    inferer.load(Engine(lambda *_: None))
    return inferer, network


def test_one_file_is_the_simple_inferer(files):
    inferer, network = loaded(files[0])
    assert torch.equal(inferer(image(), network), SimpleInferer()(image(), Toy(1).eval()))
    untouched, network = loaded(None)
    assert torch.equal(untouched(image(), network), Toy(0).eval()(image()))


def test_mean_of_logits_by_hand(files):
    inferer, network = loaded(files, ["x", "xy"])
    members = [Toy(1).eval(), Toy(2).eval()]
    views = [image(), image().flip(2), image().flip(2).flip(3)]
    expected = torch.stack([member(view) for member in members for view in views]).mean(dim=0)
    torch.testing.assert_close(inferer(image(), network), expected)
    assert not torch.allclose(expected, members[0](image()), atol=0.1)
    first = loaded(files)[0]
    assert not torch.allclose(first(image(), network), expected, atol=1e-3)  # flips make a difference


@pytest.mark.parametrize("flips", [["x"], ["y"], ["x", "y", "xy"], "x"])
def test_flips_change_nothing_for_a_network_that_does_not_feel_them(flips):
    inferer, network = loaded(None, flips)
    symmetric = network.weight.data + network.weight.data.flip(1)
    network.weight.data = symmetric + symmetric.flip(2)
    torch.testing.assert_close(inferer(image(), network), network(image()))


def test_twice_the_same_file_is_one(files):
    inferer, network = loaded([files[1], files[1]])
    assert torch.equal(inferer(image(), network), Toy(2).eval()(image()))


def test_files_are_loaded_once_and_counted(files, caplog, monkeypatch):
    reads = []
    original = torch.load
    monkeypatch.setattr("torch.load", lambda path, **options: reads.append(str(path)) or original(path, **options))
    network = Toy()
    inferer = EnsembleInferer(network, files, ["x"])
    data = DataLoader(Dataset([{"image": volume} for volume in image(5)]), batch_size=2)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=data, network=network, inferer=inferer, val_handlers=[inferer]
    )
    with caplog.at_level(logging.INFO):
        evaluator.run()
    assert reads == files
    assert [f"1 of 1 network tensors loaded from {path}" in caplog.text for path in files] == [True, True]
    assert "2 weights files, 2 views each" in caplog.text
    assert network.calls == 3 * 2  # batches x views
    assert torch.equal(network.weight, Toy(1).weight)  # the engine's network is the first member
    last = torch.stack([out["pred"] for out in evaluator.state.output])
    torch.testing.assert_close(last, inferer(image(5)[4:], network.eval()))


def test_half_precision_is_summed_in_single(files):
    inferer, network = loaded(files)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inferer(image(), network).dtype == torch.float32


def test_refuses(files, tmp_path):
    with pytest.raises(ValueError, match="empty list"):
        EnsembleInferer(Toy(), [])
    for flips in (["z"], ["x", "x"], "left"):
        with pytest.raises(ValueError, match="tta: expected a list out of 'x', 'y', 'xy'"):
            EnsembleInferer(Toy(), None, flips)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt: 0 of 1 network tensors fit"):
        loaded([files[0], str(tmp_path / "other.pt")])
