# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading weights so that nothing stays silently random: N of M tensors are counted, and what does not fit is
refused."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

__all__ = ["WeightsError", "WeightsLoader", "load_tensors", "load_weights", "read_weights"]

logger = logging.getLogger(__name__)

# what wrappers put before the names of a plain network (DDP, torch.compile, lightning)
PREFIXES = ("module.", "_orig_mod.", "model_state_dict.")


class WeightsError(ValueError):
    """A weights file that does not fit the network; the message names the file and the tensors."""


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """``torch.load`` with ``weights_only=True``: tensors and plain types, never code.

    Raises:
        WeightsError: naming the file, if it is no such file, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: refused, it holds more than tensors (weights_only): {error}") from error
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        # torch's reader answers a file of another kind with whatever its first bytes lead to
        raise WeightsError(f"{path}: not readable as a weights file: {type(error).__name__}: {error}") from error


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
        except SafetensorError as error:
            raise WeightsError(f"{path}: not readable as a safetensors file: {error}") from error
    content = load_tensors(path)
    for key in ("backbone", "network", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = sorted(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path}: expected a state dict of tensors, found {found}")
    return dict(content)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            # wrappers may stand in any order: start again
            return _strip({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, what: str = "backbone", allow_partial: bool = False
) -> tuple[int, int]:
    """Copy the tensors of a weights file into `module` and log "N of M tensors loaded".

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
    state, own = _strip(read_weights(path)), module.state_dict()
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
        raise WeightsError(f"{summary}; {'; '.join(problems)}. Is it the same backbone_name, pooling and in_channels?")
    module.load_state_dict(fitting, strict=not problems)
    logger.info("%d of %d %s tensors loaded from %s%s", len(fitting), len(own), what, path,
                f"; left as they were: {'; '.join(problems)}" if problems else "")  # fmt: skip
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
