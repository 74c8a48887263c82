# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Any timm model as a backbone of both bundles: its true width, its layouts, its pooling, a step with each family."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from networks import Backbone
from networks.backbone import POOLS, AttentionPool, GeneralisedMean
from torch import nn
from workflow.weights import load_weights

SMALL_SWIN = {
    "window_size": 7, "always_partition": True, "strict_img_size": False,
    "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8),
}  # fmt: skip
SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("name", "options", "size", "width"),
    [
        ("test_efficientnet", {}, 64, 256),
        ("mobilenetv3_small_050", {}, 64, 1024),  # timm says 288
        (SWIN, {"img_size": 64, **SMALL_SWIN}, 64, 192),
        ("test_vit", {"img_size": 64}, 64, 64),
    ],
)
def test_the_width_is_the_true_one_with_every_pool(name, options, size, width, pool):
    backbone = Backbone(name, pool=pool, backbone_kwargs=options).eval()
    found = backbone(torch.rand(2, 1, size, size))
    assert backbone.num_features == found.shape[1] == (2 * width if pool == "both" else width)
    assert torch.isfinite(found).all()
    features = backbone.feature_map(torch.rand(2, 1, size, size))
    assert features.shape[:2] == (2, width)
    assert features.dim() == 4


def test_a_model_that_reports_another_width_is_not_believed():
    backbone = Backbone("mobilenetv3_small_050")
    assert backbone.model.num_features != backbone.num_features
    assert backbone(torch.rand(1, 1, 64, 64)).shape[1] == backbone.num_features


def alive(name: str = "test_efficientnet", **options: object) -> Backbone:
    """In evaluation, with running statistics of its own: an untrained network's features fade to nothing."""
    torch.manual_seed(0)
    backbone = Backbone(name, **options)
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        for _ in range(3):
            backbone.train()(torch.rand(4, options.get("in_channels", 1), 64, 64))
    return backbone.eval()


@pytest.mark.parametrize("pool", POOLS)
def test_the_pools_are_what_they_are_called(pool):
    backbone, x = alive(pool=pool), torch.rand(2, 1, 64, 96)
    features = backbone.feature_map(x)
    assert features.std() > 0.1
    mean, largest = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
    expected = {
        "avg": mean,
        "max": largest,
        "both": torch.cat([mean, largest], dim=1),
        "attention": mean,  # starts as the mean
        "gem": features.clamp(min=1e-6).double().pow(3).mean(dim=(2, 3)).pow(1 / 3).float(),
    }
    torch.testing.assert_close(backbone(x), expected[pool], rtol=1e-4, atol=1e-5)


def test_a_swins_layout_is_turned_and_a_vits_tokens_are_pixels():
    swin = Backbone(SWIN, backbone_kwargs={"img_size": 64, **SMALL_SWIN}).eval()
    x = torch.rand(1, 1, 64, 96)
    raw = swin.model(x)  # (N, H, W, C)
    assert swin.nhwc
    assert swin.feature_map(x).shape == (1, raw.shape[3], raw.shape[1], raw.shape[2])
    torch.testing.assert_close(swin(x), raw.mean(dim=(1, 2)))
    vit = Backbone("test_vit", backbone_kwargs={"img_size": 64}).eval()
    x = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(vit(x), vit.model(x).mean(dim=1))


@given(power=st.floats(1.0, 6.0), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_generalised_mean_lies_between_mean_and_maximum(power, seed):
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) + 0.01
    found = GeneralisedMean(power)(x)
    assert (found >= x.mean(dim=(2, 3)) - 1e-4).all()
    assert (found <= x.amax(dim=(2, 3)) + 1e-4).all()


def test_the_generalised_mean_is_finite_in_half_precision_and_learns_its_power():
    pool = GeneralisedMean(3.0)
    x = torch.full((1, 2, 4, 4), 100.0, dtype=torch.float16)  # 100^3 is beyond float16
    found = pool(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.full((1, 2), 100.0, dtype=torch.float16), rtol=1e-2, atol=0)
    pool(torch.rand(2, 3, 4, 4)).sum().backward()
    assert pool.power.grad.abs() > 0


def test_attention_pooling_weighs_positions():
    pool = AttentionPool(2)
    pool.score.weight.data = torch.tensor([[100.0, 0.0]])
    x = torch.zeros(1, 2, 2, 2)
    x[0, :, 1, 0] = torch.tensor([1.0, 7.0])
    torch.testing.assert_close(pool(x), torch.tensor([[1.0, 7.0]]))


@pytest.mark.parametrize(
    ("name", "options", "pool"),
    [*(("test_efficientnet", {}, pool) for pool in POOLS), (SWIN, {"img_size": 64, **SMALL_SWIN}, "avg")],
)
def test_a_backbone_can_be_scripted(name, options, pool):
    backbone = alive(name, pool=pool, backbone_kwargs=options)
    scripted = torch.jit.script(backbone)
    for number in (1, 3):
        x = torch.rand(number, 1, 64, 64)
        torch.testing.assert_close(scripted(x), backbone(x), rtol=1e-4, atol=1e-5)


def test_channels_memory_format_and_untouched_state():
    torch.manual_seed(0)
    first = Backbone("test_efficientnet", in_channels=3)
    torch.manual_seed(0)
    second = Backbone("test_efficientnet", in_channels=3, channels_last=False)
    weights = [next(m.weight for m in b.modules() if isinstance(m, nn.Conv2d)) for b in (first, second)]
    assert weights[0].shape[1] == 3
    assert torch.equal(*weights)
    assert weights[0].is_contiguous(memory_format=torch.channels_last)
    norms = [m for m in first.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(m.num_batches_tracked == 0 and not m.running_mean.any() for m in norms)  # measuring left no trace
    assert all(m.training for m in first.modules())
    first, second = (alive(in_channels=3, channels_last=last) for last in (True, False))
    x = torch.rand(2, 3, 64, 64)
    assert first(x).std() > 0.1
    torch.testing.assert_close(first(x), second(x), rtol=1e-3, atol=1e-3)


def test_unknown_names_and_pools_are_refused():
    with pytest.raises(
        ValueError, match=r"timm knows no model 'efficientnet_b00'; similar: \['efficientnet_b0'|similar"
    ):
        Backbone("efficientnet_b00")
    with pytest.raises(ValueError, match="'efficientnet_b0'"):
        Backbone("efficientnet_bzero")
    with pytest.raises(ValueError, match=r"pool: expected one of \('avg', .*got 'mean'"):
        Backbone("test_efficientnet", pool="mean")


# the families, by config alone


@pytest.fixture
def config(root, monkeypatch) -> Iterator[Callable[..., ConfigParser]]:
    """A bundle's train.json with overrides, its folder the working directory as in a run."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]

    def parse(bundle: str, **override: object) -> ConfigParser:
        forget()
        folder = root / "bundles" / bundle
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        parser = ConfigParser()
        parser.read_config("configs/train.json")
        parser.update(override)
        return parser

    yield parse
    forget()


def voco_step(config: Callable[..., ConfigParser], name: str, options: dict, size: int = 32) -> nn.Module:
    """One optimizer step of pretraining; the backbone."""
    torch.manual_seed(0)
    override = {"backbone_name": name, "backbone_kwargs": options, "hidden_size": 16, "voco#average#total_steps": 10}
    parser = config("voco2d_pretrain", device="cpu", **override)
    network, loss, optimizer = (parser.get_parsed_content(part) for part in ("network", "loss", "optimizer"))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in network.student.parameters()}
    assert not trained & {id(p) for p in network.teacher.parameters()}
    before = [p.detach().clone() for p in network.student.parameters()]
    crops, labels = torch.rand(2, 2 + 4, 2, 1, size, size), torch.rand(2, 2, 4)
    value = loss(network.train()(crops), labels)
    value.backward()
    optimizer.step()
    assert torch.isfinite(value)
    changed = [not torch.equal(p, b) for p, b in zip(network.student.parameters(), before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    return parser.get_parsed_content("network_def")


def classifier_step(config: Callable[..., ConfigParser], name: str, options: dict, size: int = 32) -> nn.Module:
    """One optimizer step of the classifier; the network."""
    torch.manual_seed(0)
    parser = config("rsna_cnn_lstm", device="cpu", backbone_name=name, backbone_kwargs=options, hidden_size=8)
    network, loss, optimizer = (parser.get_parsed_content(part) for part in ("network", "loss", "optimizer"))
    before = network.backbone.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    logits = network.train()(torch.rand(2, 1, size, size, 3))
    assert logits.shape == (2, 11)
    value = loss(logits, torch.tensor([[0, 1, 2, 0, 1], [1, 0, 0, -1, 2]]))
    value.backward()
    optimizer.step()
    assert torch.isfinite(value)
    after = network.backbone.state_dict()
    assert sum(not torch.equal(tensor, after[key]) for key, tensor in before.items()) > 0.8 * len(before)
    return network


FAMILIES = [
    ("efficientnet_b0", {}, 32),
    (SWIN, {"img_size": 64, **SMALL_SWIN}, 64),
    ("efficientnetv2_rw_t", {}, 32),
    ("efficientnetv2_rw_s", {}, 32),
    (SWIN, {"img_size": 64, "window_size": 7, "always_partition": True, "strict_img_size": False}, 64),
]


@pytest.mark.parametrize(("name", "options", "size"), FAMILIES)
def test_a_step_of_both_bundles_with_each_family_and_its_weights_travel(config, tmp_path, caplog, name, options, size):
    pretrained = voco_step(config, name, options, size)
    torch.save(pretrained.state_dict(), tmp_path / "model.pt")
    network = classifier_step(config, name, options, size)
    number = len(pretrained.state_dict())
    with caplog.at_level(logging.INFO):
        assert load_weights(network.backbone, tmp_path / "model.pt") == (number, number)
    assert f"{number} of {number} backbone tensors loaded" in caplog.text
    x = torch.rand(2, 1, size, size)
    torch.testing.assert_close(network.eval().backbone(x), pretrained.eval()(x), rtol=1e-4, atol=0)


def swin_at(size: int, **options: object) -> Backbone:
    return Backbone(SWIN, backbone_kwargs={**SMALL_SWIN, "img_size": size, **options})


@pytest.mark.parametrize("size", [192, 96, 256])
def test_a_swin_pretrained_on_crops_loads_whole_at_another_image_size(tmp_path: Path, size):
    crops, images = swin_at(64), swin_at(size)
    torch.save(crops.state_dict(), tmp_path / "model.pt")
    number = len(crops.state_dict())
    assert load_weights(images, tmp_path / "model.pt") == (number, number)
    x = torch.rand(1, 1, size, size)
    assert torch.isfinite(images.eval()(x)).all()
    torch.testing.assert_close(crops.eval()(x), images(x), rtol=1e-3, atol=1e-4)  # the same function of any image
