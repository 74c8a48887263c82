# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CNN-LSTM classifier: a 2D CNN on each slice, a recurrent network along z, one tensor of logits for a series.

2D-VoCo (Chiu, Chen; arXiv 2601.14593), section on downstream classification: features of each slice, bidirectional LSTM
(hidden 128), maximum over slices, dropout, linear heads. Scriptable by TorchScript, for any number of slices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["CNNLSTM", "freeze_blocks"]

RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}
SLICE_POOLS = ("max", "mean", "attention")


class CNNLSTM(nn.Module):
    """``[B, C, H, W, S] -> [B, num_logits]``; the logits of all groups stand side by side (see `labels.LabelTable`).

    Args:
        backbone: ``[N, C, H, W] -> [N, F]`` with ``num_features`` F.
        num_logits: width of the output, 11 for RSNA 2023.
        rnn_type: ``lstm`` or ``gru``.
        hidden_size: of one direction.
        num_layers: of the recurrent network.
        slice_pool: how slices become a series: ``max``, ``mean`` or ``attention``.
        normalise: BN of the features before the recurrent network (not in the published network).
        dropout: before the head.
        freeze: see `freeze_blocks`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_logits: int = 11,
        *,
        rnn_type: str = "lstm",
        hidden_size: int = 128,
        num_layers: int = 1,
        slice_pool: str = "max",
        normalise: bool = True,
        dropout: float = 0.3,
        freeze: int | str = 0,
    ) -> None:
        super().__init__()
        if rnn_type not in RNNS:
            raise ValueError(f"rnn_type: expected one of {tuple(RNNS)}, got {rnn_type!r}")
        if slice_pool not in SLICE_POOLS:
            raise ValueError(f"slice_pool: expected one of {SLICE_POOLS}, got {slice_pool!r}")
        self.backbone = backbone
        # features that are not of unit scale keep the gates saturated, and nothing is learnt for many epochs
        self.norm = nn.BatchNorm1d(backbone.num_features) if normalise else nn.Identity()
        self.rnn = RNNS[rnn_type](
            backbone.num_features, hidden_size, num_layers=num_layers, batch_first=True, bidirectional=True
        )
        self.attends, self.takes_maximum = slice_pool == "attention", slice_pool == "max"
        self.attention = nn.Linear(2 * hidden_size, 1) if self.attends else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden_size, num_logits)
        freeze_blocks(backbone, freeze)

    def slice_states(self, x: Tensor) -> Tensor:
        """[B, C, H, W, S] -> states of the recurrent network, [B, S, 2 * hidden]."""
        slices = x.permute(0, 4, 1, 2, 3).flatten(0, 1)  # (B*S, C, H, W)
        features = self.norm(self.backbone(slices))
        return self.rnn(features.view(x.shape[0], x.shape[4], -1))[0]

    @torch.jit.export
    def slice_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evidence: the head on each slice, [B, S, num_logits], and the slices' weights, [B, S].

        With attention the weights are its own; else each slice's share of the pooled maximum (or 1/S for the mean).
        """
        states = self.slice_states(x)
        if self.attends:
            weights = self.attention(states).squeeze(-1).softmax(dim=1)
        elif self.takes_maximum:
            top = states == states.amax(dim=1, keepdim=True)
            weights = top.to(states.dtype).mean(dim=2)
            weights = weights / weights.sum(dim=1, keepdim=True)
        else:
            weights = torch.full_like(states[:, :, 0], 1.0 / states.shape[1])
        return self.head(states), weights

    def forward(self, x: Tensor) -> Tensor:
        states = self.slice_states(x)
        if self.attends:
            weights = self.attention(states).softmax(dim=1)  # (B, S, 1)
            pooled = (weights * states).sum(dim=1)
        elif self.takes_maximum:
            pooled = states.amax(dim=1)
        else:
            pooled = states.mean(dim=1)
        return self.head(self.dropout(pooled))

    @torch.jit.unused
    def train(self, mode: bool = True) -> CNNLSTM:
        super().train(mode)
        for module in self.backbone.modules():
            parameters = list(module.parameters())
            if (parameters or isinstance(module, _BatchNorm)) and not any(p.requires_grad for p in parameters):
                module.eval()  # a frozen layer keeps its running statistics too, and drops nothing out
        return self


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The backbone's blocks from input to output: its stem, each stage or block of the timm model, its last layers."""
    model = getattr(backbone, "model", backbone)
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Sequential):
            found.extend(child.children())
        elif any(True for _ in child.parameters()) or isinstance(child, _BatchNorm):
            found.append(child)
    return found


def freeze_blocks(backbone: nn.Module, freeze: int | str) -> None:
    """Take blocks out of training, from the input on.

    Args:
        backbone: whose blocks.
        freeze: number of blocks; ``all`` for the whole backbone (linear evaluation); a negative number leaves that many
            last blocks to train.

    Raises:
        ValueError: for more blocks than there are.
    """
    if freeze == "all":
        frozen = [backbone]
    else:
        found = blocks(backbone)
        if not isinstance(freeze, int) or abs(freeze) > len(found):
            raise ValueError(f"freeze_blocks: expected 'all' or an integer up to {len(found)} blocks, got {freeze!r}")
        frozen = found[:freeze]
    for module in frozen:
        module.requires_grad_(False)
    if frozen:  # position embeddings and class tokens belong to the input, and to no block
        for parameter in getattr(backbone, "model", backbone).parameters(recurse=False):
            parameter.requires_grad_(False)
