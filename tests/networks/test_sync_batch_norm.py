# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""BN over processes on a CPU is BN of their batches put together."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Backbone
from networks.sync_batch_norm import CPUSyncBatchNorm, convert_cpu_sync_batchnorm
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from workflow.gather import ranks

from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from tests.workflow.ranks import in_processes

RANKS = 3
# layer, dimensions behind the channels; sizes of the ranks' batches in turn
LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "crops": (lambda: nn.BatchNorm1d(5, affine=False), 0),
    "sequence": (lambda: nn.BatchNorm1d(5), 1),
    "pixels": (lambda: nn.BatchNorm2d(5, eps=1e-3), 2),
    "timm": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU, drop_layer=nn.Tanh, inplace=False), 2),
    "voxels": (lambda: nn.BatchNorm3d(5), 3),
    "teacher": (lambda: nn.BatchNorm2d(5, momentum=0.0), 2),
    "mean of batches": (lambda: nn.BatchNorm2d(5, momentum=None), 2),
    "no statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), 2),
}
SIZES = [(2, 2, 2), (3, 3, 2), (1, 1, 1), (7, 1, 4)]


def step(layer: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out.square() * weights).sum().backward()
    return out.detach(), x.grad


def compare(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, extra = LAYERS[name]
    torch.manual_seed(0)
    plain = make().to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    synchronised = convert_cpu_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synchronised, CPUSyncBatchNorm)
    rank, _ = ranks()
    for sizes in SIZES:  # one layer over several steps: the running statistics add up
        whole = 3 + 2 * torch.randn(sum(sizes), 5, *[4] * extra, dtype=dtype)
        weights = torch.randn_like(whole)
        if extra == 2:
            whole = whole.contiguous(memory_format=torch.channels_last)
        plain.zero_grad()
        synchronised.zero_grad()
        expected = step(plain, whole, weights)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        out, gradient = step(synchronised, whole[mine], weights[mine])
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(out, expected[0][mine], **close)
        torch.testing.assert_close(gradient, expected[1][mine], **close)
        if extra == 2:
            assert out.is_contiguous(memory_format=torch.channels_last)
        for one, all_of_them in zip(synchronised.parameters(), plain.parameters(), strict=True):
            total = one.grad.clone()
            torch.distributed.all_reduce(total)  # as DistributedDataParallel does
            torch.testing.assert_close(total, all_of_them.grad, **close)
        assert synchronised.state_dict().keys() == plain.state_dict().keys()
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(synchronised.state_dict()[key], value, **close)
    if plain.track_running_stats:
        torch.testing.assert_close(synchronised.eval()(whole[:1]), plain.eval()(whole[:1]), rtol=1e-5, atol=1e-5)


def every_layer() -> None:
    for name in LAYERS:
        compare(name, torch.float64, 1e-11)
        compare(name, torch.float32, 1e-4)
    lonely = CPUSyncBatchNorm(nn.BatchNorm1d(2))
    assert lonely(torch.randn(1, 2)).shape == (1, 2)  # the others have one each
    with pytest.raises(ValueError, match=r"expected \[B, C, ...\], got \(2,\)"):
        lonely(torch.randn(2))


def test_as_bn_of_all_batches_together_in_output_gradient_and_running_statistics(tmp_path):
    in_processes(RANKS, tmp_path, every_layer)


def test_large_mean_and_small_variance_do_not_cancel():
    """In one process, where nothing is summed over others, the formula is the same."""
    x = 1000 + 0.01 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    expected = nn.BatchNorm1d(3)(x.double().float())
    torch.testing.assert_close(CPUSyncBatchNorm(nn.BatchNorm1d(3))(x), expected, rtol=1e-2, atol=1e-2)


def test_one_value_has_no_variance():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        CPUSyncBatchNorm(nn.BatchNorm1d(2))(torch.zeros(1, 2))


def test_the_network_keeps_its_names_its_parameters_and_the_teachers_policy():
    network = VoCoNetwork(Backbone("test_efficientnet"), hidden=8, out=8)
    crops = torch.rand(2, 3, 2, 1, 32, 32)
    before, parameters = network.state_dict(), list(network.parameters())
    expected = copy.deepcopy(network)(crops)
    assert convert_cpu_sync_batchnorm(network) is network
    assert list(network.state_dict()) == list(before)
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    found = network(crops)
    for name, value in expected.items():  # timm's activations among them
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    layers = [layer for layer in network.teacher.modules() if isinstance(layer, CPUSyncBatchNorm)]
    assert layers
    assert all(layer.momentum == 0.0 for layer in layers)
    network.eval().train()
    assert all(layer.training for layer in layers)
