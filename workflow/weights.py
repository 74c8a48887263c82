# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading weights so that nothing stays silently random: N of M tensors are counted, and what does not fit is
refused."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from .card import card_notice
from .foreign_weights import LAYOUTS, TORCHVISION, strip_wrappers, timm_facts, translate

__all__ = ["WeightsError", "WeightsLoader", "load_tensors", "load_weights", "read_weights"]

logger = logging.getLogger(__name__)

# the keys under which a checkpoint keeps its network: ours, and those of others
NETWORK_KEYS = ("backbone", "network", "model", "state_dict", "model_state_dict")


class WeightsError(ValueError):
    """A weights file that does not fit the network; the message names the file and the tensors."""


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """``torch.load`` with ``weights_only=True``: tensors and plain types, never code.

    Raises:
        WeightsError: naming the file, if it is no such file, damaged, or holds anything else.
    """
    _refuse_bomb(Path(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # of torch's message, what names the reason and does not advise to switch the check off
        named = re.search(r"GLOBAL (\S+)", str(error))
        reasons = [line.strip() for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        what = f"it names {named[1]}" if named else " ".join(reasons[:1])
        raise WeightsError(
            f"{path}: refused, it holds more than tensors and plain types, so that loading it could run code ({what}). "
            "A file that holds model.state_dict() alone is read."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, MemoryError) as error:
        # torch's reader answers a file of another kind with whatever its first bytes lead to
        raise WeightsError(f"{path}: not readable as a weights file: {type(error).__name__}: {error}") from error


def _refuse_bomb(path: Path) -> None:
    """torch stores its archives uncompressed: one that unpacks to more than the file was made to fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older format, or damaged: torch's reader will say
    if unpacked > path.stat().st_size:
        raise WeightsError(
            f"{path}: refused, a file of {path.stat().st_size} bytes that unpacks to {unpacked}: "
            "expected an archive as torch.save writes it, which is not compressed"
        )


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A flat state dict from ``.pt`` (read with ``weights_only=True``, never otherwise) or ``.safetensors``.

    A full checkpoint of ours or of others is unwrapped where the network stands under a usual key.

    Raises:
        WeightsError: if the file is missing, unsafe or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: expected a weights file, found none")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
            raise WeightsError(f"{path}: not readable as a safetensors file: {error}") from error
    content = load_tensors(path)
    for key in NETWORK_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = sorted(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path}: expected a state dict of tensors, found {found}")
    return dict(content)


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, what: str = "backbone", allow_partial: bool = False
) -> tuple[int, int]:
    """Copy the tensors of a weights file into `module` and log "N of M tensors loaded".

    Files of others are read by their layout, see `workflow.foreign_weights`; half precision is cast to the module's
    type. What the file's model card warns of is logged as a warning.

    Args:
        module: the network (or part of one) that the file's names belong to.
        path: see `read_weights`.
        what: the part's name in messages.
        allow_partial: load what fits and list the rest, instead of refusing.

    Returns:
        (tensors loaded, tensors of the module).

    Raises:
        WeightsError: naming the missing, unexpected and misshapen tensors; always if not one fits.
    """
    file, own = strip_wrappers(read_weights(path)), module.state_dict()
    try:
        found = translate(file, own, timm_facts(module))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    state = found.state
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [name for name in own if name in state and own[name].shape != state[name].shape]
    fitting = {name: state[name] for name in own if name in state and name not in misshapen}
    summary = f"{path}: {len(fitting)} of {len(own)} {what} tensors fit"
    problems = [
        f"{len(names)} {kind} (such as {', '.join(names[:3])})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems and (not allow_partial or not fitting):
        layouts = "; ".join(layout.name for layout in LAYOUTS)
        known = "" if fitting else f" Known files: {layouts}, which for torchvision is {', '.join(TORCHVISION)}."
        raise WeightsError(
            f"{summary}; {'; '.join(problems)}. Is it the same backbone_name, pooling and in_channels?{known}"
        )
    module.load_state_dict(fitting, strict=not problems)
    told = [found.layout, *found.notes, *([f"left as they were: {'; '.join(problems)}"] if problems else [])]
    logger.info("%d of %d %s tensors loaded from %s (%s)", len(fitting), len(own), what, path, "; ".join(told))
    if notice := card_notice(path):
        logger.warning("%s: %s", path, notice)
    return len(fitting), len(own)


class WeightsLoader:
    """Handler that calls `load_weights` when the engine starts; a path of None leaves the network as initialised, and
    says so.

    Args:
        path, module, what, allow_partial: as in `load_weights`.
    """

    def __init__(
        self, path: str | None, module: nn.Module, *, what: str = "backbone", allow_partial: bool = False
    ) -> None:
        self.path, self.module, self.what, self.allow_partial = path, module, what, allow_partial

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.path is None:
            logger.info("%s: no weights given, random initialisation", self.what)
        else:
            load_weights(self.module, self.path, what=self.what, allow_partial=self.allow_partial)
