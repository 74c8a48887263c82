# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of tensors that are whole or not there, which of them are checkpoints, and whether weights are the same."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .run import whole_file

__all__ = ["checksum", "is_rescued", "is_whole", "newest_checkpoint", "numbered", "save_tensors"]


def save_tensors(path: Path, content: Any) -> None:
    """``torch.save`` of a whole file; what a killed run left half-written beside it is removed.

    Raises:
        OSError: naming the file, where the disk is full or fails.
    """
    for leftover in path.parent.glob("*.pt.*.tmp"):
        leftover.unlink()
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer hides what the system said
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from None
            raise OSError(f"{path} could not be written: {error}") from error
    # the name too has to be on the disk before an older file is removed
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_whole(path: Path) -> bool:
    """Whether a file that `save_tensors` wrote still is what it was, by the checksums in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError, OSError):
        return False


def numbered(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(iteration, path) of the checkpoints in a folder, the newest first."""
    name = re.compile(r"checkpoint_(\d+)(\.rescued)?\.pt")
    found = [(name.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint_*.pt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint of the highest iteration.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    found = numbered(folder)
    if not found:
        raise FileNotFoundError(f"resume: no checkpoint in {folder}")
    return found[0][1]


def is_rescued(path: Path) -> bool:
    """Whether a checkpoint is the state before a step that went wrong, which may be about to go wrong again."""
    return path.name.endswith(".rescued.pt")


def checksum(things: Iterable[Any]) -> int:
    """Of all parameters of the modules among some things, bit for bit."""
    found = 0
    modules = [thing for thing in things if isinstance(thing, nn.Module)]
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        found = zlib.crc32(parameter.detach().cpu().flatten().view(torch.uint8).numpy(), found)
    return found
