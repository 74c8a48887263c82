# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes of one gloo group on this machine, as torchrun would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ports import free_port

# not forked from the test: the threads of autograd, which a test before may have started, do not survive that
METHOD = "forkserver"
mp.get_context(METHOD).set_forkserver_preload(["torch", "monai.engines", "ignite.engine"])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def _process(
    rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple, join: bool
) -> None:
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    if join:
        dist.init_process_group("gloo")
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    if join:
        dist.destroy_process_group()


def in_processes(
    size: int, folder: Path, function: Callable[..., Any], *arguments: Any, join: bool = True
) -> list[Any]:
    """What `function` gives on each process; an error in one is raised here.

    Args:
        join: False leaves it to `function` to join the group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _process, args=(size, free_port(), str(folder), function, arguments, join), nprocs=size, start_method=METHOD
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
