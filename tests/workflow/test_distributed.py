# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes on a CPU train as one with a batch of twice the size."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import ignite.distributed as idist
import pytest
import torch
import torch.multiprocessing as mp
from networks import Backbone
from networks.sync_batch_norm import CPUSyncBatchNorm
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from workflow import distributed
from workflow.distributed import ProcessGroup, parallel
from workflow.sampler import EpochSampler

from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from tests.ports import free_port
from tests.workflow.ranks import METHOD

RANKS = 2
DATA = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def step(module: nn.Module, plain: nn.Module, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Weights after one step on these items."""
    module(DATA[numbers]).square().mean().backward()
    return {name: parameter.detach() - 0.1 * parameter.grad for name, parameter in plain.named_parameters()}


def process(rank: int, folder: str, port: int) -> None:
    """What torchrun starts."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": RANKS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "SLURM_JOB_ID": 1,
        "SLURM_LOCALID": 0,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    group, hook = ProcessGroup(backend="gloo", device="cpu"), sys.excepthook
    torch.manual_seed(11)
    group.start()
    draws = torch.rand(3)
    plain = network()
    if rank:
        plain[0].weight.data.zero_()  # rank 0's weights are everybody's
    module = parallel(plain, group.device)
    sampler = EpochSampler(len(DATA), seed=2)
    shard = list(sampler)
    result = {"rank": group.rank, "shard": shard, "weights": step(module, plain, shard), "draws": draws}
    torch.save({**result, "wrapped": isinstance(module, DistributedDataParallel)}, Path(folder) / f"{rank}.pt")
    assert idist.get_world_size() == RANKS  # now Ignite has a model of the group, which must go with it
    assert (idist.get_local_rank(), idist.get_nproc_per_node()) == (rank, RANKS)  # SLURM says 0 for both
    peers = group.peers
    assert sys.excepthook == peers._explain
    group.stop()
    group.stop()
    assert not torch.distributed.is_initialized()
    assert idist.get_world_size() == 1
    assert idist.get_rank() == 0
    assert sys.excepthook == hook
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_processes_share_the_data_and_step_alike(tmp_path):
    mp.start_processes(process, args=(str(tmp_path), free_port()), nprocs=RANKS, start_method=METHOD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert [f["rank"] for f in found] == [0, 1]
    assert all(f["wrapped"] for f in found)
    assert found[0]["shard"] != found[1]["shard"]
    assert set(found[0]["shard"] + found[1]["shard"]) == set(range(len(DATA)))
    torch.manual_seed(11)
    assert torch.equal(found[0]["draws"], torch.rand(3))
    assert not torch.equal(found[0]["draws"], found[1]["draws"])
    plain = network()
    expected = step(plain, plain, found[0]["shard"] + found[1]["shard"])
    for name, weight in expected.items():
        assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
        torch.testing.assert_close(found[0]["weights"][name], weight)


def test_outside_torchrun_the_error_says_what_is_missing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="needs torchrun: the environment lacks RANK, LOCAL_RANK, WORLD_SIZE"):
        ProcessGroup(backend="gloo", device="cpu")


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    chosen, started = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        "workflow.distributed.dist.init_process_group", lambda backend, timeout: started.append((backend, timeout))
    )
    monkeypatch.setattr("workflow.distributed.Peers", Mock())
    group = ProcessGroup()
    group.start()
    group.stop()
    assert (group.rank, group.device) == (5, torch.device("cuda:1"))
    assert chosen == [torch.device("cuda:1")]
    assert started == [("nccl", timedelta(minutes=30))]
    with pytest.raises(ValueError, match="timeout_minutes: expected a positive number, got 0"):
        ProcessGroup(timeout_minutes=0)
    for named in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device: '{named}' names one GPU for all processes; leave it null"):
            ProcessGroup(device=named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1' was asked for"):
        ProcessGroup()


def test_batch_norm_is_shared_over_processes(monkeypatch):
    def module() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    monkeypatch.setattr("workflow.distributed.DistributedDataParallel", lambda m, device_ids: (m, device_ids))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    kinds = {(cpu, True): CPUSyncBatchNorm, (cuda, True): nn.SyncBatchNorm}
    for device in (cpu, cuda):
        for shared in (True, False):
            plain = module()
            found, device_ids = parallel(plain, device, sync_batch_norm=shared)
            assert found is plain  # in place: the module that is saved has it too
            assert device_ids == ([cuda] if device == cuda else None)
            assert type(plain[1]) is kinds.get((device, shared), nn.BatchNorm2d)


def test_synchronised_bn_keeps_the_activations_of_timm():
    """torch's own conversion drops them without a word: the network would compute another function."""
    backbone = Backbone("test_efficientnet")
    before = [type(layer.act) for layer in backbone.modules() if isinstance(layer, BatchNormAct2d)]
    after = [
        type(layer.act) for layer in convert_sync_batchnorm(backbone).modules() if isinstance(layer, SyncBatchNormAct)
    ]
    assert before == after
    assert any(kind is not torch.nn.Identity for kind in after)
    assert distributed.convert_sync_batchnorm is convert_sync_batchnorm


def test_synchronised_bn_keeps_the_teacher_of_momentum_zero():
    network = VoCoNetwork(Backbone("test_efficientnet"), hidden=8, out=8)
    converted = convert_sync_batchnorm(network)
    layers = [layer for layer in converted.teacher.modules() if isinstance(layer, _BatchNorm)]
    assert layers
    assert all(layer.momentum == 0.0 for layer in layers)
