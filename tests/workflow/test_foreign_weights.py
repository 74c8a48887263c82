# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights files of others: those that are known compute what their own network computes, the others are refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from networks.backbone import Backbone
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from workflow.foreign_weights import TORCHVISION, timm_facts, translate
from workflow.weights import WeightsError, load_weights

from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork

TINY = "test_efficientnet"


def random_statistics(module: nn.Module) -> nn.Module:
    """Running statistics and affine weights that are not those of a new network, so that a swap of two shows."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.weight.data.uniform_(0.8, 1.2, generator=generator)
    return module.eval()


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def timm_model() -> nn.Module:
    """A timm network with one input channel, as the original's student."""
    torch.manual_seed(1)
    return random_statistics(timm.create_model(TINY, in_chans=1, num_classes=7))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_computes(backbone: Backbone, model: nn.Module, channels: int = 1) -> None:
    """The backbone gives the mean of the model's own feature map."""
    image = torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.forward_features(image).mean(dim=(2, 3))
        torch.testing.assert_close(backbone.eval()(image), expected, rtol=1e-4, atol=1e-5)


# --- this project's own ---


def of_the_student(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("student.backbone."): t for n, t in state.items() if n.startswith("student.backbone.")}


@pytest.mark.parametrize("kind", ["pretraining", "classifier", "flat"])
def test_every_file_of_ours_starts_a_backbone(tmp_path, caplog, kind):
    torch.manual_seed(2)
    source = Backbone(TINY)
    if kind == "pretraining":
        whole = VoCoNetwork(source, hidden=8, out=8)
        for parameter in whole.teacher.parameters():  # a teacher apart from the student: whose tensors are taken shows
            parameter.data.add_(1.0)
    else:
        whole = CNNLSTM(source, hidden_size=4) if kind == "classifier" else source
    content = {"network": whole.state_dict(), "optimizer": {"state": {}}, "trainer": {"epoch": 1}}
    path = saved(whole.state_dict() if kind == "flat" else content, tmp_path / "checkpoint_3.pt")
    module = Backbone(TINY)
    with caplog.at_level(logging.INFO):
        loaded, total = load_weights(module, path)
    assert loaded == total == len(module.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert f"{total} of {total} backbone tensors loaded from {path} (" in caplog.text
    dropped = {
        "pretraining": r"of this project, its student; dropped: student.projector \(\d+\), teacher \(\d+\)",
        "classifier": r"a classifier of this project; dropped: norm \(5\), rnn \(8\), head \(2\)",
        "flat": r"this project's weights\)",
    }
    assert re.search(dropped[kind], caplog.text)


def test_whole_networks_are_loaded_whole(tmp_path):
    """Inference of the classifier and evaluation of a pretraining take all of a checkpoint, not its backbone."""
    for make in (lambda: VoCoNetwork(Backbone(TINY), hidden=8, out=8), lambda: CNNLSTM(Backbone(TINY), hidden_size=4)):
        source, module = make(), make()
        total = len(source.state_dict())
        assert load_weights(module, saved({"network": source.state_dict()}, tmp_path / "a.pt")) == (total, total)
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_teacher_is_never_taken_for_a_student(tmp_path, timm_model, allow_partial):
    ours = prefixed("teacher.module.backbone.", Backbone(TINY).state_dict())
    for number, state in enumerate((ours, prefixed("teacher.", timm_model.state_dict()))):
        path = saved(state, tmp_path / f"{number}.pt")
        with pytest.raises(WeightsError, match=r"pt: 0 of \d+ backbone tensors fit.*such as teacher"):
            load_weights(Backbone(TINY), path, allow_partial=allow_partial)


# --- the original's, and timm's ---

ORIGINAL: dict[str, Callable[[nn.Module], dict]] = {
    "the original's pretraining, its student": lambda model: {
        **prefixed("student.", model.state_dict()),
        **{name.replace("student", "teacher"): t + 1 for name, t in prefixed("student.", model.state_dict()).items()},
        "student_proj_head.layer1.0.weight": torch.zeros(3, 4),
        "teacher_proj_head.layer1.0.weight": torch.zeros(3, 4),
    },
    "the original's later pretraining, its student": lambda model: {
        **prefixed("student.backbone.", model.state_dict()),
        **prefixed("teacher.backbone.", model.state_dict()),
        "student.projector.layer1.0.weight": torch.zeros(3, 4),
    },
    "the original's classifier": lambda model: {
        **prefixed("backbone.", model.state_dict()),
        "rnn.weight_ih_l0": torch.zeros(3, 4),
        "head.bowel_head.weight": torch.zeros(1, 4),
    },
    "timm's or torchvision's names": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("layout", ORIGINAL)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"global_step": 5, "state_dict": prefixed("module.", state), "optimizer": {"state": {}}},
        lambda state: {"state_dict": prefixed("_orig_mod.module.", state)},
        lambda state: {"state_dict": {**prefixed("net.", state), "loss.weight": torch.zeros(1)}, "epoch": 1},
    ],
    ids=["plain", "ddp", "compiled", "lightning"],
)
def test_files_with_timm_names_compute_what_timm_computes(tmp_path, caplog, timm_model, layout, wrap):
    path, backbone = saved(wrap(ORIGINAL[layout](timm_model)), tmp_path / "theirs.pth"), Backbone(TINY)
    with caplog.at_level(logging.INFO):
        loaded, total = load_weights(backbone, path)
    assert loaded == total
    assert f"({layout}; dropped: " in caplog.text
    assert "classifier (2)" in caplog.text
    if "its student" in layout:
        assert "teacher (" in caplog.text
    assert_computes(backbone, timm_model)


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("neighbours", [0, 1, 2])
def test_three_colours_become_the_channels_of_the_input(tmp_path, caplog, suffix, neighbours):
    channels = 2 * neighbours + 1
    model = random_statistics(timm.create_model(TINY, num_classes=7))
    path = tmp_path / f"imagenet.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else saved(model.state_dict(), path)
    backbone = Backbone(TINY, in_channels=channels)
    with caplog.at_level(logging.INFO):
        loaded, total = load_weights(backbone, path)
    assert loaded == total
    # one grey slice in all channels gives what three equal colours gave
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(grey.expand(-1, 3, -1, -1)).mean(dim=(2, 3))
        found = backbone.eval()(grey.expand(-1, channels, -1, -1))
    assert ("conv_stem: 3 input channels made" in caplog.text) == (channels != 3)
    # five channels are the three repeated and cut off, so their sum is not that of the three
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5) == (channels != 5)


def test_channels_of_ours_are_not_added_up(tmp_path):
    path = saved(Backbone(TINY, in_channels=3).state_dict(), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"1 of another shape \(such as model.conv_stem.weight\)"):
        load_weights(Backbone(TINY), path)


# --- torchvision's ---

PAIRS = [
    ("resnet18", "resnet18"), ("resnext50_32x4d", "resnext50_32x4d"), ("densenet121", "densenet121"),
    *((ours, theirs) for ours, (theirs, _) in TORCHVISION.items()),
]  # fmt: skip
FAST = {"resnet18", "efficientnet_b0", "efficientnetv2_s", "convnext_tiny", "mobilenetv3_small_100", "mnasnet_100"}


def torchvision_features(model: nn.Module, image: Tensor) -> Tensor:
    if hasattr(model, "features"):
        maps = model.features(image)
        if isinstance(model, torchvision.models.DenseNet):
            maps = maps.relu()
        return maps.mean(dim=(2, 3))
    if hasattr(model, "layers"):
        return model.layers(image).mean(dim=(2, 3))
    for name, layer in model.named_children():
        if name == "avgpool":
            break
        image = layer(image)
    return image.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("ours", "theirs"), [pytest.param(*pair, marks=() if pair[0] in FAST else pytest.mark.slow) for pair in PAIRS]
)
def test_torchvision_weights_compute_what_torchvision_computes(tmp_path, ours, theirs):
    torch.manual_seed(4)
    model = random_statistics(getattr(torchvision.models, theirs)(weights=None))
    options = {"bn_eps": 1e-3} if TORCHVISION.get(ours, ("", 0.0))[1] == 1e-3 else {}
    state = model.state_dict()
    if "densenet" in theirs:  # as torchvision's files name them
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): t for name, t in state.items()}
    backbone = Backbone(ours, in_channels=3, backbone_kwargs=options)
    found = translate(state, backbone.state_dict(), timm_facts(backbone))
    assert set(found.state) == set(backbone.state_dict())
    backbone.load_state_dict(found.state)
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        timm_maps, expected = backbone.eval().model.forward_features(image), torchvision_features(model, image)
    torch.testing.assert_close(timm_maps.mean(dim=(2, 3)), expected, rtol=1e-3, atol=1e-5)


def test_torchvision_weights_of_another_epsilon_or_size_are_refused(tmp_path):
    model = torchvision.models.mobilenet_v3_small(weights=None)
    path = saved(model.state_dict(), tmp_path / "mobilenet.pth")
    with pytest.raises(
        WeightsError, match=r"mobilenet.pth: .*eps 0.001, this .*--backbone_kwargs \"{'bn_eps': 0.001}\""
    ):
        load_weights(Backbone("mobilenetv3_small_100"), path)
    module = Backbone("mobilenetv3_small_100", backbone_kwargs={"bn_eps": 0.001})
    assert load_weights(module, path) == (242, 242)
    with pytest.raises(WeightsError, match=r"0 of \d+ backbone tensors fit.*Known files: .*mobilenetv3_small_100"):
        load_weights(Backbone("mobilenetv3_large_100"), path, allow_partial=True)


def test_torchvision_networks_without_a_mapping_are_refused(tmp_path):
    state = torchvision.models.regnet_y_400mf(weights=None).state_dict()
    with pytest.raises(WeightsError, match=r"0 of \d+ backbone tensors fit.*torchvision's names, in timm's order"):
        load_weights(Backbone("regnety_004"), saved(state, tmp_path / "regnet.pth"))


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg"])
def test_weights_come_through_the_checked_door_alone(name):
    with pytest.raises(ValueError, match=f"backbone_kwargs: {name} would load weights unchecked"):
        Backbone(TINY, backbone_kwargs={name: "weights.pth"})
