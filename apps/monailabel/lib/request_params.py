# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that clients send along as JSON, checked before anything acts on them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Body, Form

from .errors import Unusable, few, quoted

__all__ = ["ORIGINAL", "JsonBody", "JsonField", "inference_params", "json_object", "task_params"]

JsonField = Annotated[str, Form()]
JsonBody = Annotated[dict[str, Any] | None, Body()]
ORIGINAL = "original"
FLIPS = ("x", "y", "xy")
INFERENCE = ("evidence", "save_label", "label_tag", "device", "tta")
# MONAI Label's clients send these by themselves; they are about masks, several GPUs or a viewer
IGNORED = {"logging", "multi_gpu", "gpus", "max_workers", "max_batch_size", "client_id", "timeout", "restore_label_idx",
           "result_extension", "result_dtype", "result_compress", "result_write_to_file"}  # fmt: skip
# what a task is about: the address of the request says it
NAMES = {"model", "method", "strategy", "image", "images", "label", "session_id", "bundle_path", "local_rank"}


def json_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object of a form's field. Raises Unusable if it is none."""
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what}: expected a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise Unusable(f"{what}: expected a JSON object, got {type(content).__name__}")
    return content


def inference_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a request for inference may say: `INFERENCE`. Nothing in it is ever taken for a path.

    Raises:
        Unusable: for an unknown name or a value of the wrong kind.
    """
    unknown = sorted(set(params) - set(INFERENCE) - IGNORED)
    if unknown:
        raise Unusable(f"params: unknown {few(unknown, show=quoted)}; known are {', '.join(INFERENCE)}")
    if params.get("label_tag") not in (None, ORIGINAL):
        raise Unusable(f"label_tag: predictions are kept as '{ORIGINAL}'; a final label is a reader's")
    found: dict[str, Any] = {name: _flag(name, params[name]) for name in ("evidence", "save_label") if name in params}
    device, flips = params.get("device"), params.get("tta")
    if device:
        if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", str(device)):
            raise Unusable("device: expected cpu, cuda or cuda:NUMBER")
        found["device"] = device
    if flips:
        if not isinstance(flips, list) or any(flips.count(flip) > 1 or flip not in FLIPS for flip in flips):
            raise Unusable(f"tta: expected a list out of {', '.join(FLIPS)}, each once at most")
        found["tta"] = flips
    return found


def task_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request for a background task says beside its address. Raises Unusable if it contradicts that."""
    own = sorted(NAMES & set(params or {}))
    if own:
        raise Unusable(f"params: {few(own, show=quoted)} cannot be given here: the address says what the task is about")
    gpus = (params or {}).get("gpus") or "all"
    if not re.fullmatch(r"all|\d{1,2}(,\d{1,2})*", str(gpus)):
        raise Unusable("gpus: expected all, or numbers with commas")
    return dict(params or {})


def _flag(name: str, value: Any) -> bool:
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise Unusable(f"{name}: expected true or false")
