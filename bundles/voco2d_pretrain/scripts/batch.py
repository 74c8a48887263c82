# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""From the loader's batch to what the VoCo network and loss take."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

__all__ = ["PrepareCrops"]


class PrepareCrops(PrepareBatch):
    """Random and base crops of a batch as one tensor, scaled on the device, and the overlap labels.

    Crops travel as uint8 (a quarter of float32's memory between processes and to the GPU).

    Returns:
        crops [B, R+K, S, C, *spatial] float32 in [0, 1], random crops first; overlap [B, R, K] float32.
    """

    def __call__(
        self,
        batchdata: dict[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        overlap = batchdata["overlap"]
        random = batchdata["random_crops"].to(device, non_blocking=non_blocking)
        base = batchdata["base_crops"].to(device, non_blocking=non_blocking)
        grid_dims = base.ndim - random.ndim + 1  # the grid's axes stand between batch and slices
        crops = torch.cat([random, base.flatten(1, grid_dims)], dim=1)
        if crops.dtype == torch.uint8:
            crops = crops.to(torch.float32).div_(255.0)
        return crops, overlap.to(device, non_blocking=non_blocking)
