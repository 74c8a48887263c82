# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A 3D encoder for the comparison that no config has: SwinUNETR's."""

from __future__ import annotations

from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn


class SwinEncoder(nn.Module):
    """The encoder of MONAI's SwinUNETR (its `swinViT`, with SwinUNETR's own defaults), pooled: ``[N, 1, X, Y, Z] -> [N,
    num_features]``.

    Args:
        feature_size: width of the first stage (3D VoCo: 48).
        window: side of the window of attention, in tokens.
    """

    def __init__(self, feature_size: int = 48, window: int = 7) -> None:
        super().__init__()
        self.model = SwinTransformer(
            in_chans=1, embed_dim=feature_size, window_size=(window,) * 3, patch_size=(2, 2, 2),
            depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24),
        )  # fmt: skip
        self.num_features = 16 * feature_size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[-1].mean(dim=(2, 3, 4))
