# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Student and teacher: shapes, the projector's axis, batch normalisation, three dimensions."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.network import CropEncoder, VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage


class Cnn(nn.Module):
    """A small backbone: convolution, BN, mean."""

    num_features = 6

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


def crops(batch: int = 2, number: int = 6, slices: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(batch, number, slices, 1, size, size, generator=torch.Generator().manual_seed(seed))


def network(momentum: float = 0.5, dropout: float = 0.0) -> VoCoNetwork:
    torch.manual_seed(0)
    return VoCoNetwork(Cnn(dropout), hidden=16, out=12, average=MomentumAverage(momentum))


def layers_of(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def running(module: nn.Module) -> list[Tensor]:
    return [b.clone() for layer in layers_of(module) for b in (layer.running_mean, layer.running_var)]


def differ(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def train_student(voco: VoCoNetwork, steps: int = 2, lr: float = 0.5) -> None:
    """Away from the start, with running statistics of its own."""
    optimizer = torch.optim.SGD(voco.student.parameters(), lr=lr)
    for seed in range(steps):
        optimizer.zero_grad()
        VoCoLoss()(voco.train()(crops(seed=seed)), torch.rand(2, 2, 4)).backward()
        optimizer.step()


def test_shapes():
    voco = network()
    assert set(voco.train()(crops())) == {"student", "teacher"}
    found = voco.eval()(crops())
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "student": (2, 6, 12), "teacher": (2, 6, 12), "slices": (2, 3, 6),
    }  # fmt: skip


def test_the_teacher_is_the_student_at_the_start():
    voco = network()
    student, teacher = voco.student.state_dict(), voco.teacher.module.state_dict()
    assert list(student) == list(teacher)
    assert any("projector" in name for name in student)
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(voco.student.parameters(), voco.teacher.parameters(), strict=True)
    )
    for mode in (False, True):  # a forward pass in training changes the running statistics of the student
        found = voco.train(mode)(crops())
        assert torch.equal(found["student"], found["teacher"])


def test_the_teacher_takes_no_gradient_and_builds_no_graph():
    voco = network()
    train_student(voco)
    found = voco.train()(crops().requires_grad_())
    assert not found["teacher"].requires_grad
    assert found["teacher"].grad_fn is None
    VoCoLoss()(found, torch.rand(2, 2, 4)).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in voco.teacher.parameters())
    assert all(parameter.grad is not None for parameter in voco.student.parameters())


def test_the_slices_of_a_crop_are_averaged_before_the_projector():
    voco = network().eval()
    x, backbone = crops(), voco.student.backbone

    def embed(crop: Tensor) -> Tensor:
        return voco.student.projector(torch.stack([backbone(s[None])[0] for s in crop]).mean(dim=0)[None])[0]

    expected = torch.stack([torch.stack([embed(crop) for crop in volume]) for volume in x])
    found = voco(x)
    torch.testing.assert_close(found["student"], expected, rtol=1e-4, atol=1e-5)
    per_slice = torch.stack([backbone(x[:, n].flatten(0, 1)).unflatten(0, (2, 3)) for n in range(6)])
    torch.testing.assert_close(found["slices"], per_slice.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_order_of_slices_plays_no_part():
    voco = network().eval()
    x = crops()
    torch.testing.assert_close(voco(x)["student"], voco(x.flip(2))["student"])


def test_the_batch_norm_of_the_projector_acts_over_the_crops():
    encoder = CropEncoder(Cnn(), hidden=16, out=12).train()
    features = torch.rand(4, 11, 3, 6)
    x = features.mean(dim=2).reshape(44, 6).double()
    for linear in (encoder.projector[0], encoder.projector[3]):
        x = x @ linear.weight.double().T
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()  # each channel over all 44 crops
        x = x.clamp(min=0)
    last = encoder.projector[6]
    expected = x @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(encoder.project(features).double(), expected.reshape(4, 11, 12), rtol=1e-3, atol=1e-4)
    norms = layers_of(encoder.projector)
    assert [(norm.num_features, norm.affine) for norm in norms] == [(16, False), (16, False)]


def test_a_forward_pass_never_changes_the_teachers_running_statistics():
    voco = network()
    train_student(voco)
    teacher, student = running(voco.teacher), running(voco.student)
    parameters = [p.clone() for p in voco.teacher.parameters()]
    voco.train()(crops(seed=5))
    assert not any(differ(running(voco.teacher), teacher))
    assert all(differ(running(voco.student), student))
    voco.eval()(crops(seed=6))
    assert not any(differ(running(voco.teacher), teacher))
    assert not any(differ([p.clone() for p in voco.teacher.parameters()], parameters))


def test_the_teachers_running_statistics_are_the_students_after_each_move():
    voco = network(momentum=0.9)
    for steps in (1, 2):
        train_student(voco, steps)
        assert all(differ(running(voco.teacher), running(voco.student)))
        voco.move_teacher()
        assert not any(differ(running(voco.teacher), running(voco.student)))


def test_in_training_the_teacher_normalises_by_the_batch_and_drops_nothing():
    voco = network(dropout=0.5)
    train_student(voco)
    voco.move_teacher()
    x = crops(seed=7)
    voco.train()
    dropping = [m.training for m in voco.teacher.modules() if isinstance(m, nn.Dropout)]
    assert (dropping, [n.training for n in layers_of(voco.teacher)]) == ([False], [True] * 3)
    first, second = voco(x), voco(x)
    assert torch.equal(first["teacher"], second["teacher"])
    assert not torch.equal(first["student"], second["student"])
    # the same by hand: a copy whose every BN uses the batch
    twin = copy.deepcopy(voco.teacher.module).eval()
    for norm in layers_of(twin):
        norm.train()
    torch.testing.assert_close(first["teacher"], twin(x))
    evaluated = voco.eval()(x)["teacher"]
    assert not torch.allclose(evaluated, first["teacher"], atol=1e-2)
    torch.testing.assert_close(evaluated, voco.teacher.module.eval()(x))
    assert not any(module.training for module in voco.modules())


def test_a_state_dict_round_trip_keeps_everything():
    voco = network()
    train_student(voco)
    voco.move_teacher()
    other = VoCoNetwork(Cnn(), hidden=16, out=12, average=MomentumAverage(0.5))
    other.load_state_dict(voco.state_dict())
    for name in ("student", "teacher"):
        assert torch.equal(other.eval()(crops())[name], voco.eval()(crops())[name])
    assert int(other.teacher.n_averaged) == 2


def test_three_dimensions_are_the_same_network_with_one_slice():
    torch.manual_seed(0)
    backbone = ResNet(
        "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_size=3
    )
    voco = VoCoNetwork(backbone, hidden=16, out=12, num_features=8, average=MomentumAverage(0.9))
    volumes = torch.rand(2, 10, 1, 1, 16, 16, 16)  # two random and 2x2x2 base crops
    labels = torch.rand(2, 2, 8)
    optimizer = torch.optim.SGD(voco.student.parameters(), lr=0.1)
    loss, values = VoCoLoss("v1"), []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(voco.train()(volumes), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[1] < values[0]
    assert voco.eval()(volumes)["slices"].shape == (2, 1, 8)
    with pytest.raises(AttributeError, match="num_features"):
        VoCoNetwork(copy.deepcopy(backbone))
