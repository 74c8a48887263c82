# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training in several processes by torch's own means: ``torchrun`` starts them, each takes its share of the data.

The bundles' ``multi_gpu_train.json`` puts these into a run; with ``--backend gloo --device cpu`` it runs without a GPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .run import select_device
from .sync_batch_norm import convert_cpu_sync_batchnorm

__all__ = ["ProcessGroup", "SharedBuffers", "parallel"]


class ProcessGroup:
    """This process among those that ``torchrun`` started.

    Args:
        backend: ``nccl`` or ``gloo``.
        device: None for the CUDA device of the local rank; or ``cpu``.

    Raises:
        RuntimeError: outside ``torchrun``.
    """

    def __init__(self, backend: str = "nccl", device: str | None = None) -> None:
        absent = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
        if absent:
            raise RuntimeError(f"multi_gpu_train needs torchrun: the environment lacks {', '.join(absent)}")
        self.backend, self.rank = backend, int(os.environ["RANK"])
        self.device = select_device(f"cuda:{os.environ['LOCAL_RANK']}" if device is None else device)

    def start(self) -> None:
        """Join the group; everything that asks for rank or world size comes after this."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(self.backend)

    def stop(self) -> None:
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
