# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Meta data on tensors, quickly: they are on every slice and crop of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaObj, MetaTensor
from monai.utils import MetaKeys, SpaceKeys

__all__ = ["with_meta"]


def with_meta(plain: torch.Tensor, meta: Mapping[str, Any], applied_operations: Sequence[Any] = ()) -> MetaTensor:
    """`plain`, a volume, slices or crops, as a MetaTensor with these meta data, in a dictionary of its own, and
    transforms applied.

    What ``MetaTensor(plain, meta=meta)`` gives, without its conversion of an affine that is converted already, which
    takes longer than cutting all crops of a volume.
    """
    affine = meta.get("affine")
    known = isinstance(affine, torch.Tensor) and affine.shape == (4, 4) and affine.dtype == torch.float64
    if not known or affine.device.type != "cpu" or plain.ndim < 4:
        return MetaTensor(plain, meta=dict(meta), applied_operations=list(applied_operations))
    found = plain.as_subclass(MetaTensor)
    MetaObj.__init__(found)
    found.meta = dict(meta)
    found.meta.setdefault(MetaKeys.SPACE, SpaceKeys.RAS)
    found.applied_operations = list(applied_operations)
    return found
