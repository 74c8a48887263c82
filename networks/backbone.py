# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One backbone for both bundles: any timm model, pooled to a vector, whose width is measured and never assumed.

>>> import torch
>>> backbone = Backbone("test_efficientnet", pool="both")
>>> backbone(torch.zeros(2, 1, 64, 64)).shape, backbone.num_features
(torch.Size([2, 512]), 512)
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

__all__ = ["POOLS", "Backbone", "GeneralisedMean"]

# arguments of timm.create_model that read weights past workflow.weights
WEIGHTS_OPTIONS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
POOLS = ("avg", "max", "both", "gem", "attention")


class GeneralisedMean(nn.Module):
    """Generalised-mean pooling (Radenović et al., TPAMI 2019): ``mean(relu(x)^p)^(1/p)``, p learnt, [N, C, H, W] -> [N,
    C]."""

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(float(power)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # in float32: x^p overflows half precision
        return x.float().clamp(min=self.eps).pow(self.power).mean(dim=(2, 3)).pow(1.0 / self.power).to(x.dtype)


class AttentionPool(nn.Module):
    """A learnt softmax weight for each position, [N, C, H, W] -> [N, C]; starts as the plain mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, 1)
        nn.init.zeros_(self.score.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (N, H*W, C)
        return (self.score(tokens).softmax(dim=1) * tokens).sum(dim=1)


class AvgPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class MaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return adaptive_max_pool2d(x, 1).flatten(1)


class AvgMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=(2, 3)), adaptive_max_pool2d(x, 1).flatten(1)], dim=1)


class Backbone(nn.Module):
    """A timm feature extractor with a pooling of our own, ``[N, C, H, W] -> [N, num_features]``.

    timm's models differ in the layout of their feature map (CNN: NCHW, Swin: NHWC, ViT: tokens) and some report a width
    that is not the one they return, so both are handled here once. No weight is ever downloaded.

    Args:
        name: a timm model name, such as ``efficientnet_b0``, ``efficientnetv2_rw_s`` or
            ``swin_tiny_patch4_window7_224``.
        in_channels: channels of the input (1 for CT slices; 2n+1 with n neighbouring slices as channels).
        pool: ``avg``, ``max``, ``both`` (concatenated), ``gem`` or ``attention``.
        channels_last: keep the weights in channels_last order (about 1.6x faster convolutions on a CPU).
        backbone_kwargs: further keyword arguments of ``timm.create_model``. A Swin whose weights must fit another image
            size takes ``img_size=..., window_size=7, always_partition=True, strict_img_size=False``.

    Raises:
        ValueError: for an unknown model name or pooling, or weights among `backbone_kwargs`.
    """

    def __init__(
        self,
        name: str = "efficientnet_b0",
        *,
        in_channels: int = 1,
        pool: str = "avg",
        channels_last: bool = True,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool: expected one of {POOLS}, got {pool!r}")
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
            raise ValueError(f"backbone_name: timm knows no model {name!r}; similar: {near}")
        options = dict(backbone_kwargs or {})
        if WEIGHTS_OPTIONS & set(options):
            raise ValueError(
                f"backbone_kwargs: {', '.join(sorted(WEIGHTS_OPTIONS & set(options)))} would load weights unchecked or "
                "from the network: give a local file as pretrained_path"
            )
        self.model = timm.create_model(
            name, pretrained=False, in_chans=in_channels, num_classes=0, global_pool="", scriptable=True, **options
        )
        self.nhwc = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        side = options.get("img_size") or self.model.default_cfg.get("input_size", (3, 224, 224))[-1]
        width = self._measure_width(in_channels, side if isinstance(side, int) else side[-1])
        self.num_features = 2 * width if pool == "both" else width
        self.pool = self._make_pool(pool, width)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @staticmethod
    def _make_pool(pool: str, width: int) -> nn.Module:
        if pool == "gem":
            return GeneralisedMean()
        if pool == "attention":
            return AttentionPool(width)
        return {"avg": AvgPool, "max": MaxPool, "both": AvgMaxPool}[pool]()

    @torch.no_grad()
    def _measure_width(self, in_channels: int, side: int) -> int:
        """Channels of the feature map, from one forward pass that leaves no trace (evaluation mode)."""
        was_training = self.model.training
        self.model.eval()
        width = self.feature_map(torch.zeros(1, in_channels, side, side)).shape[1]
        self.model.train(was_training)
        return int(width)

    def feature_map(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, h, w], whatever layout the timm model returns."""
        y = self.model(x)
        if y.dim() == 3:  # tokens of a plain transformer: (N, L, F)
            return y.transpose(1, 2).unsqueeze(-1)
        return y.permute(0, 3, 1, 2) if self.nhwc else y

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.feature_map(x))
