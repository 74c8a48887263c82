# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which settings of a bundle's training a request may change: numbers, switches and plain words, by the names of the
config. Never a path or an expression, nor what the network is: a version has to fit the inference of this server."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .bundles import CLASSIFIER, PRETRAINING
from .errors import Unusable

__all__ = ["check_parameters", "fixed_by_inference", "open_parameters"]

# what MONAI Label and its clients add to any request; what belongs to a model stands under its name
PASSED_OVER = ("model", "name", "gpus", "multi_gpu", "local_rank", "bundle_path", "client_id", CLASSIFIER, PRETRAINING)
# names of places and of what decides who trains: the server's own, or for the settings file
PLACE = re.compile(r"_(dir|file|path|root|name|uri)$")
OWN = ("datalist", "exclude", "resume", "fold", "num_folds", "split_seed", "val_fraction", "skip_unlabelled", "strict",
       "anonymise", "slice_loss_weight", "is_not_rank0", "save_execute_config")  # fmt: skip
# of pretraining: what the classifier's backbone has to share
BACKBONE = ("backbone_name", "backbone_kwargs", "pool")
WORD = re.compile(r"[A-Za-z][A-Za-z0-9:-]{0,31}", re.ASCII)  # cuda:1, all, max: no dot, slash, $ or @
Plain = bool | int | float | str | None


def fixed_by_inference(bundle: Path) -> Collection[str]:
    """The settings that `evaluate.json` compares with those of the training, without which the weights do not fit."""
    path = bundle / "configs" / "evaluate.json"
    check = json.loads(path.read_text(encoding="utf-8")).get("weights_check", {})
    return (*check.get("settings", ()), *BACKBONE)


def open_parameters(config: Mapping[str, Any], fixed: Collection[str]) -> dict[str, Plain]:
    """Name and value of each setting of a config that a request may change."""
    found = {}
    for name in config["_desc_"]:
        value = config.get(name)
        closed = name in OWN or name in fixed or PLACE.search(name) or name not in config
        text = isinstance(value, str) and not WORD.fullmatch(value)
        if not closed and not text and (value is None or isinstance(value, bool | int | float | str)):
            found[name] = value
    return found


def check_parameters(
    request: Mapping[str, Any], config: Mapping[str, Any], fixed: Collection[str], own: Collection[str] = ()
) -> dict[str, Plain]:
    """The settings of a training that a request changes.

    Args:
        request: as MONAI Label hands it over. config: of the training, with its ``_desc_``.
        fixed: names that a request may not change, see `fixed_by_inference`.
        own: further names that the task itself reads.

    Raises:
        Unusable: naming each unknown name with its near misses, and each value that is not what it should be.
    """
    known = open_parameters(config, fixed)
    given = {name: value for name, value in request.items() if name not in (*PASSED_OVER, *own)}
    problems = [_refusal(name, config, fixed, [*known, *own]) for name in given if name not in known]
    problems += [_wrong(name, given[name], known[name]) for name in given if name in known]
    if any(problems):
        raise Unusable("; ".join(filter(None, problems)))
    return given


def _refusal(name: str, config: Mapping[str, Any], fixed: Collection[str], known: Collection[str]) -> str:
    shown = repr(name)[:60]
    if name in fixed:
        return f"{shown} belongs to the network and cannot be changed by a request: inference would no longer fit"
    if name in config["_desc_"]:
        return f"{shown} is the server's: it cannot be changed by a request"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"
    return f"unknown parameter {shown}: {hint}"


def _wrong(name: str, value: Any, default: Plain) -> str:
    """What is wrong with a value, or nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name}: expected a finite number, got {value}"
    if isinstance(value, str):
        wanted = "a number" if _is_number(default) and name != "freeze_blocks" else "a plain word"
        good = WORD.fullmatch(value) and not isinstance(default, bool) and wanted == "a plain word"
        return "" if good else f"{name}: expected {wanted} as {default!r}, got {value[:60]!r}"
    if value is None:
        return "" if default is None else f"{name}: expected a value as {default!r}, got null"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else f"{name}: expected true or false, got {value!r}"[:200]
    if _is_number(default):
        whole = isinstance(default, int)
        good = isinstance(value, int) if whole else _is_number(value)
        good = good and not isinstance(value, bool)
        return "" if good else f"{name}: expected {'a whole number' if whole else 'a number'}, got {value!r}"[:200]
    good = default is None and isinstance(value, bool | int | float)
    return "" if good else f"{name}: expected a value as {default!r}, got {value!r}"[:200]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
