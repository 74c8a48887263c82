# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training in several processes by torch's own means: ``torchrun`` starts them, each takes its share of the data.

The bundles' ``multi_gpu_train.json`` puts these into a run; with ``--backend gloo --device cpu`` it runs without a GPU.
"""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from networks.sync_batch_norm import convert_cpu_sync_batchnorm
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .peers import Peers
from .progress import reseed
from .run import select_device

__all__ = ["ProcessGroup", "SharedBuffers", "parallel"]


class ProcessGroup:
    """This process among those that ``torchrun`` started.

    Between `start` and `stop` a process that ends takes the others with it, and each says so (see `workflow.peers`).

    Args:
        backend: ``nccl`` or ``gloo``.
        device: None for the CUDA device of the local rank; or ``cpu``.
        timeout_minutes: how long a process waits for the others where they meet; longer than one of them may need
            alone, as for preparing series that are not in the cache yet.

    Raises:
        RuntimeError: outside ``torchrun``. ValueError: for a time that is not positive, or one GPU for all processes.
    """

    def __init__(self, backend: str = "nccl", device: str | None = None, timeout_minutes: float = 30) -> None:
        absent = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
        if absent:
            raise RuntimeError(f"multi_gpu_train needs torchrun: the environment lacks {', '.join(absent)}")
        if not timeout_minutes > 0:
            raise ValueError(f"timeout_minutes: expected a positive number, got {timeout_minutes!r}")
        if device is not None and torch.device(device).type == "cuda":
            raise ValueError(
                f"device: {device!r} names one GPU for all processes; leave it null, each takes that of its local rank "
                "(CUDA_VISIBLE_DEVICES says which there are), or ask for cpu"
            )
        self.backend, self.rank, self.timeout = backend, int(os.environ["RANK"]), timedelta(minutes=timeout_minutes)
        self.device = select_device(f"cuda:{os.environ['LOCAL_RANK']}" if device is None else device)
        self.peers: Peers | None = None

    def start(self) -> None:
        """Join the group; everything that asks for rank or world size comes after this."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "SLURM_JOB_ID" in os.environ:
            # Ignite believes SLURM before torchrun; with one torchrun a node SLURM counts 0 for all its processes
            os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]
        self._hook = sys.excepthook  # torch puts one that names the rank around it, for good
        dist.init_process_group(self.backend, timeout=self.timeout)
        if self.rank:  # random draws in the network are each process's own; `parallel` shares the first's weights
            reseed(torch.initial_seed(), self.rank)
        atexit.register(self.stop)  # of a run that fails, too
        self.peers = Peers()
        self.peers.watch()

    def stop(self) -> None:
        """Leave the group; nothing is left of it in this process. Once is enough, more do no harm."""
        atexit.unregister(self.stop)
        if self.peers is not None:
            self.peers.unwatch()
            sys.excepthook = self._hook
            self.peers = None
        idist.finalize()  # Ignite keeps a model of its own of the group, which would outlive it
        if dist.is_initialized():  # nothing has asked Ignite for it
            dist.destroy_process_group()


def parallel(module: nn.Module, device: torch.device, *, sync_batch_norm: bool = True) -> DistributedDataParallel:
    """The module on its device under DistributedDataParallel, its BN over the batches of all processes."""
    module = module.to(device)
    if sync_batch_norm and device.type != "cuda":
        module = convert_cpu_sync_batchnorm(module)
    elif sync_batch_norm:
        # timm's, not torch's: timm's BN layers hold an activation, which torch's conversion would drop without a word;
        # in place of each BN layer, so that `module` itself, which the weights are saved from, has them too
        module = convert_sync_batchnorm(module)
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


class SharedBuffers:
    """Evaluator handler: before it starts, every process takes the buffers of the first, whose weights are saved.

    The evaluator has the module itself and not `parallel`'s: that one would exchange buffers at each batch, and the
    processes may have different numbers of them. Without synchronised BN each has running statistics of its own.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        for buffer in engine.network.buffers():
            dist.broadcast(buffer, 0)
