# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What moved the network's decision on one series: which slices (occlusion, attention) and where in them (GradCAM).

Both look at the features of the slices, so that the backbone, nearly all of the work, runs once a series and not once
for each occluded slice, as ``monai.visualize.OcclusionSensitivity`` on the image would have it. Neither says where an
injury is: they describe this network on this series.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from monai.networks.utils import eval_mode, replace_modules_temp
from monai.visualize import GradCAM
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .labels import LabelTable
from .network import CNNLSTM

__all__ = ["SeriesEvidence", "find_evidence", "injury_log_odds"]

logger = logging.getLogger(__name__)

OCCLUSIONS_AT_ONCE = 32  # rows of one pass through the recurrent network; bounds the memory of long series


@dataclass(frozen=True)
class SeriesEvidence:
    """The evidence of one series in its S slices for G groups; all tensors on the CPU."""

    log_odds: Tensor  # [G] of injury
    change: Tensor  # [G, S] how far each slice raises (> 0) or lowers (< 0) the log-odds
    attention: Tensor | None  # [S] weights of the network that has them; they sum to 1
    top: Tensor  # [G, K] int64, the slices of the largest change, the largest first
    heat: Tensor  # [G, K, X, Y] in 0..1, GradCAM of the top slices, scaled to the maximum in each group


def injury_log_odds(table: LabelTable, logits: Tensor) -> Tensor:
    """Log-odds of any injury in each group, ``log(p / (1 - p))`` with p the sum of the injured classes' probabilities.

    [..., L] -> [..., G]. A two-class group's logit is that already.
    """
    odds = []
    for part in logits.split(list(table.heads.values()), dim=-1):
        odds.append(part[..., 0] if part.shape[-1] == 1 else part[..., 1:].logsumexp(-1) - part[..., 0])
    return torch.stack(odds, dim=-1)


def find_evidence(network: CNNLSTM, image: Tensor, table: LabelTable, num_slices: int = 3) -> SeriesEvidence:
    """The evidence of one series.

    Args:
        network: a CNN-LSTM whose backbone is `networks.backbone.Backbone` (or has its ``feature_map`` and ``pool``).
        image: [C, X, Y, S], the network's input.
        table: the groups.
        num_slices: K, at most S.

    Change: the log-odds as they are, less those with the slice's feature vector replaced by the mean of all other
    slices' (a single slice has no others: its change is 0). Recurrent network, pooling and head run again, in float32
    and evaluation mode. The slice as a channel of its neighbours (2.5D) stays.

    Heat: GradCAM of the group's log-odds at the backbone's last feature map, CNN (NCHW) and Swin (NHWC) alike. A plain
    transformer returns tokens, not a map: its heat is 0, and a warning says so.
    """
    device = next(network.parameters()).device
    slices = image.to(device, torch.float32).movedim(-1, 0)  # (S, C, X, Y)
    with eval_mode(network), torch.autocast(device.type, enabled=False):
        pool = network.backbone.pool
        maps = network.backbone.feature_map(slices).contiguous()  # (S, F, x, y)
        features = pool(maps)  # (S, F)
        # from here on the network's input are features, and its backbone has nothing left to do
        with replace_modules_temp(network, "backbone", nn.Flatten(1)):
            log_odds, change = _occlude(network, features, table)
            attention = network.slice_logits(_as_image(features[None]))[1][0] if network.attends else None
            top = change.topk(min(num_slices, len(slices)), dim=1).indices  # (G, K)
            if _is_grid(maps, slices):
                decide = partial(_Decision, network, pool, features, table)
                heat = torch.stack([_grad_cam(decide(k), maps[k], group) for group, k in enumerate(top)])
            else:
                logger.warning("the backbone returns tokens instead of a feature map: evidence without heat maps")
                heat = maps.new_zeros(*top.shape, 1, 1)
    heat = interpolate(heat, slices.shape[2:], mode="bilinear", align_corners=False)
    heat = heat / heat.amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    attention = None if attention is None else attention.cpu()
    return SeriesEvidence(log_odds.cpu(), change.cpu(), attention, top.cpu(), heat.cpu())


def _as_image(features: Tensor) -> Tensor:
    """[B, S, F] -> [B, F, 1, 1, S], slices of one pixel with F channels."""
    return features.transpose(1, 2)[:, :, None, None, :]


def _occlude(network: CNNLSTM, features: Tensor, table: LabelTable) -> tuple[Tensor, Tensor]:
    """Log-odds [G], and by how much each slice changes them [G, S], from the features [S, F]."""
    count = len(features)
    log_odds = injury_log_odds(table, network(_as_image(features[None])))[0]
    others = (features.sum(dim=0) - features) / max(count - 1, 1) if count > 1 else features  # (S, F)
    without = []
    for index in torch.arange(count, device=features.device).split(OCCLUSIONS_AT_ONCE):
        occluded = features.repeat(len(index), 1, 1)  # (n, S, F)
        occluded[torch.arange(len(index), device=index.device), index] = others[index]
        without.append(injury_log_odds(table, network(_as_image(occluded))))
    return log_odds, (log_odds - torch.cat(without)).T


def _is_grid(maps: Tensor, slices: Tensor) -> bool:
    """Whether a feature map is one of pixels; `Backbone` gives tokens as a map of one column."""
    rows, columns = slices.shape[2:]
    return maps.shape[3] > 1 or maps.shape[2] * columns <= 2 * rows


class _Decision(nn.Module):
    """Feature maps of the slices at `index`, [K, F, x, y] -> log-odds [1, G]; the other slices stay as they are."""

    def __init__(self, network: CNNLSTM, pool: nn.Module, features: Tensor, table: LabelTable, index: Tensor) -> None:
        super().__init__()
        self.maps = nn.Identity()  # the layer that GradCAM looks at
        self.network, self.pool, self.table = network, pool, table
        self.features, self.index = features, index
        self.eval()  # or MONAI would set the network to training mode after the map, as it found this module

    def forward(self, maps: Tensor) -> Tensor:
        features = self.features.index_copy(0, self.index, self.pool(self.maps(maps)))
        return injury_log_odds(self.table, self.network(_as_image(features[None])))


def _grad_cam(decision: _Decision, maps: Tensor, group: int) -> Tensor:
    """[K, F, x, y] -> [K, x, y]: where the maps raise the log-odds of the group."""
    # cuDNN has no backward pass of a recurrent network in evaluation mode
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        cam = GradCAM(decision, "maps").compute_map(maps.requires_grad_(), class_idx=group)
    decision.zero_grad()
    return cam[:, 0].detach()
