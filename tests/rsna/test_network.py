# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CNN-LSTM: shapes, any number of slices, TorchScript, evidence, frozen blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM, blocks, freeze_blocks

POOLS = ("max", "mean", "attention")


class Cnn(nn.Module):
    """[N, C, H, W] -> [N, 5], with BN and three blocks."""

    num_features = 5

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 5, 3)
        self.stages = nn.Sequential(nn.Sequential(nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)), nn.ReLU())
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x))).mean(dim=(2, 3))


def network(**options: object) -> CNNLSTM:
    torch.manual_seed(0)
    made = CNNLSTM(options.pop("backbone", None) or Cnn(), **{"hidden_size": 6, **options})
    for norm in made.modules():  # statistics of their own, as after training
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
@pytest.mark.parametrize("slice_pool", POOLS)
@pytest.mark.parametrize("slices", [1, 7, 48])
def test_shapes_for_any_number_of_slices_and_torchscript(rnn_type, slice_pool, slices):
    module = network(rnn_type=rnn_type, slice_pool=slice_pool).eval()
    assert isinstance(module.rnn, nn.LSTM if rnn_type == "lstm" else nn.GRU)
    scripted = torch.jit.script(module)
    x = torch.rand(2, 1, 10, 12, slices)
    assert module(x).shape == (2, 11)
    torch.testing.assert_close(scripted(x), module(x), rtol=1e-4, atol=1e-6)
    for found, expected in zip(scripted.slice_logits(x), module.slice_logits(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_scripted_real_backbone_works_for_two_numbers_of_slices(tmp_path):
    module = network(backbone=Backbone("test_efficientnet", in_channels=3)).eval()
    torch.jit.save(torch.jit.script(module), tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts")
    for slices in (4, 9):
        x = torch.rand(2, 3, 32, 32, slices)
        torch.testing.assert_close(loaded(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slice_pool", POOLS)
@pytest.mark.parametrize("normalise", [True, False])
def test_the_network_is_its_slow_self(slice_pool, normalise):
    module = network(slice_pool=slice_pool, num_layers=2, normalise=normalise).eval()
    assert isinstance(module.norm, nn.BatchNorm1d if normalise else nn.Identity)
    x = torch.rand(3, 1, 9, 11, 6)
    for b in range(3):
        features = torch.stack([module.backbone(x[b, :, :, :, s][None])[0] for s in range(6)])
        states = module.rnn(module.norm(features)[None])[0][0]
        assert states.shape == (6, 12)
        if slice_pool == "max":
            pooled = states.max(dim=0).values
        elif slice_pool == "mean":
            pooled = states.mean(dim=0)
        else:
            pooled = (module.attention(states).softmax(dim=0) * states).sum(dim=0)
        torch.testing.assert_close(module(x)[b], module.head(pooled), rtol=1e-4, atol=1e-6)


def test_the_order_of_slices_matters():
    module = network().eval()
    x = torch.rand(1, 1, 9, 9, 6)
    assert not torch.allclose(module(x), module(x[..., [5, 1, 2, 3, 4, 0]]), atol=1e-5)


@pytest.mark.parametrize("slice_pool", POOLS)
def test_the_evidence_of_slices(slice_pool):
    module = network(slice_pool=slice_pool).eval()
    x = torch.rand(2, 1, 9, 9, 6)
    logits, weights = module.slice_logits(x)
    assert logits.shape == (2, 6, 11)
    assert weights.shape == (2, 6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    assert (weights >= 0).all()
    states = module.slice_states(x)
    torch.testing.assert_close(logits, module.head(states))
    if slice_pool == "max":
        owners = states.argmax(dim=1)  # (B, 2 * hidden)
        slow = torch.stack([(owners == s).float().mean(dim=1) for s in range(6)], dim=1)
        torch.testing.assert_close(weights, slow)
    elif slice_pool == "mean":
        torch.testing.assert_close(weights, torch.full((2, 6), 1 / 6))
    if slice_pool != "max":  # a linear head: the weighted mean of the slices' logits is the series' logit
        torch.testing.assert_close((weights[..., None] * logits).sum(dim=1), module(x), rtol=1e-4, atol=1e-5)


def test_equal_slices_share_the_maximum():
    module = network().eval()
    module.rnn = nn.Identity()
    module.rnn.forward = lambda x: (x, None)  # no context: equal slices have equal states
    module.head = nn.Linear(5, 11)
    _, weights = module.slice_logits(torch.rand(1, 1, 9, 9, 1).expand(1, 1, 9, 9, 4))
    torch.testing.assert_close(weights, torch.full((1, 4), 0.25))


def test_dropout_is_for_training_alone():
    module = network(dropout=0.9).eval()
    x = torch.rand(1, 1, 9, 9, 4)
    assert torch.equal(module(x), module(x))
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = 0.0
    module.train()
    assert not torch.equal(module(x), module(x))


def trained_blocks(module: CNNLSTM) -> list[bool]:
    return [
        all(p.requires_grad for p in block.parameters())
        for block in blocks(module.backbone)
        if list(block.parameters())
    ]


@pytest.mark.parametrize(
    ("freeze", "trains"),
    [
        (0, [True, True, True]),
        (1, [False, True, True]),
        (3, [False, False, True]),
        (4, [False, False, False]),
        (-1, [False, False, True]),
        (-4, [True, True, True]),
        ("all", [False, False, False]),
    ],
)
def test_blocks_are_frozen_from_the_input_on(freeze, trains):
    module = network(freeze=freeze).train()
    assert [type(block) for block in blocks(module.backbone)] == [nn.Conv2d, nn.Sequential, nn.ReLU, nn.BatchNorm2d]
    assert trained_blocks(module) == trains
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module(torch.rand(4, 1, 9, 9, 5)).square().sum().backward()
    optimizer.step()
    after = module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    parts = ["stem.", "stages.", "norm."]
    for part, expected in zip(parts, trains, strict=True):
        mine = {name for name in before if name.startswith(f"backbone.{part}")}
        assert bool(mine & changed) == expected
        if not expected:  # running statistics too
            assert not mine & changed
    assert {"head.weight", "head.bias"} <= changed
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name


def test_all_freezes_what_stands_outside_the_blocks_too():
    module = network(backbone=Backbone("test_efficientnet", pool="gem"), freeze="all").train()
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert any("power" in name for name, _ in module.backbone.named_parameters())
    norms = [m for m in module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    module.eval()
    module.train()
    assert not any(norm.training for norm in norms)
    assert all(p.requires_grad for p in [*module.rnn.parameters(), *module.head.parameters()])


def test_the_blocks_of_an_efficientnet_are_stem_stages_and_head():
    backbone = Backbone("efficientnet_b0")
    found = blocks(backbone)
    assert len(found) == 11
    assert found[0] is backbone.model.conv_stem
    assert found[2] is backbone.model.blocks[0]
    assert found[-2] is backbone.model.conv_head
    freeze_blocks(backbone, -3)
    assert not any(p.requires_grad for p in backbone.model.blocks[5].parameters())
    assert all(p.requires_grad for p in backbone.model.blocks[6].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnn_type": "rnn"}, r"rnn_type: expected one of \('lstm', 'gru'\), got 'rnn'"),
        ({"slice_pool": "avg"}, r"slice_pool: expected one of \('max', 'mean', 'attention'\), got 'avg'"),
        ({"freeze": 5}, "freeze_blocks: expected 'all' or an integer up to 4 blocks, got 5"),
        ({"freeze": -5}, "freeze_blocks: expected 'all' or an integer up to 4 blocks, got -5"),
        ({"freeze": "none"}, "freeze_blocks: expected 'all' or an integer up to 4 blocks, got 'none'"),
        ({"freeze": 1.5}, "got 1.5"),
    ],
)
def test_unknown_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_frozen_blocks_drop_nothing_out_and_keep_position_embeddings():
    backbone = Backbone("test_vit", backbone_kwargs={"img_size": 32, "drop_path_rate": 0.5, "proj_drop_rate": 0.5})
    network(backbone=backbone, freeze=-1).train()
    frozen, trained = blocks(backbone)[:-1], blocks(backbone)[-1]
    assert not any(part.training for block in frozen for part in block.modules())
    assert trained.training
    assert not backbone.model.pos_embed.requires_grad
    assert network(
        backbone=Backbone("test_vit", backbone_kwargs={"img_size": 32})
    ).backbone.model.pos_embed.requires_grad
