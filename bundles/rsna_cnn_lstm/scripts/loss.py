# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training loss of the classifier: sample-weighted binary and categorical cross-entropy, summed over the groups."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.utils import convert_to_tensor
from torch import nn
from torch.nn import functional

from .labels import MISSING, LabelTable, first_few

__all__ = ["InjuryLoss"]


class InjuryLoss(nn.Module):
    """Sum over the groups of the sample-weighted cross-entropy (2D-VoCo, classification stage).

    For logits z and the true class y of group g of item b::

        L = sum_g L_g,   L_g = 1/B * sum_b [y_bg is labelled] * w_g(y_bg) * l_g(z_bg, y_bg)

    with l the binary cross-entropy for groups of two classes (one logit, that of the injury) and the cross-entropy of
    the softmax elsewhere, and w the ``loss_weight`` of the true class: healthy 1, low 2, high 4, bowel injury 2,
    extravasation injury 6. The sum is divided by the batch size B, not by the number of labelled items nor by the sum
    of the weights: every labelled item weighs the same whatever stands beside it, so that accumulated and distributed
    batches add up to the large one. A group without a label in the batch gives 0 with gradient 0.

    Args:
        labels_file: path of the label table, or the table itself.
        groups: names of the groups to keep (single-organ heads); ``None`` for all.
        use_weights: ``False`` sets every weight to 1.
        label_smoothing: share in [0, 1) of the target spread evenly over the classes of the group.

    Attributes:
        last_terms: the detached L_g of the latest call, by group name, for logging.
    """

    def __init__(
        self,
        labels_file: str | Path | LabelTable,
        groups: list[str] | None = None,
        use_weights: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if isinstance(labels_file, LabelTable):
            self.table = labels_file if groups is None else labels_file.select(groups)
        else:
            self.table = LabelTable.from_file(labels_file, groups)
        self.label_smoothing = label_smoothing
        counts = [len(group.classes) for group in self.table.groups]
        weights = torch.ones(len(counts), max(counts))  # [G, classes], padded
        for row, group in enumerate(self.table.groups if use_weights else ()):
            weights[row, : counts[row]] = torch.tensor(group.loss_weights)
        self.weights: torch.Tensor
        self.num_classes: torch.Tensor
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("num_classes", torch.tensor(counts), persistent=False)
        self.last_terms: dict[str, torch.Tensor] = {}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch.

        Args:
            logits: [B, L], half precision is raised to float32.
            targets: [B, G] integer class indices, -1 for a group without a label.

        Returns:
            Scalar tensor.

        Raises:
            ValueError: shapes do not fit the label table, or an index is out of its group's range.
        """
        terms = self.terms(logits, targets)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()

    def terms(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scalar L_g by group name; arguments and errors as :meth:`forward`."""
        logits, targets = (convert_to_tensor(value, track_meta=False) for value in (logits, targets))
        self._check(logits, targets)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        targets = targets.long()
        labelled = targets != MISSING  # [B, G]
        columns = torch.arange(targets.shape[1], device=targets.device)
        weights = self.weights.to(logits.dtype)[columns, targets.clamp(min=0)] * labelled  # [B, G]
        parts = logits.split(list(self.table.heads.values()), dim=1)
        terms = {}
        for column, (group, part) in enumerate(zip(self.table.groups, parts, strict=True)):
            losses = self._cross_entropy(part, targets[:, column])  # [B]
            terms[group.name] = (losses * weights[:, column]).mean()
        return terms

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[B, 1 or C] logits and [B] classes -> [B] losses; unlabelled items are masked later."""
        target = target.clamp(min=0)
        if logits.shape[1] > 1:
            return functional.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
        smooth = target.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits[:, 0], smooth, reduction="none")

    def _check(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        wanted = (self.table.num_logits, len(self.table.groups))
        if logits.ndim != 2 or targets.ndim != 2 or (logits.shape[1], targets.shape[1]) != wanted:
            raise ValueError(
                f"InjuryLoss expects logits [B, {wanted[0]}] and targets [B, {wanted[1]}], "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        if len(logits) != len(targets) or len(logits) == 0:
            raise ValueError(f"InjuryLoss got {len(logits)} logits rows for {len(targets)} target rows")
        if targets.is_floating_point():
            raise ValueError(f"targets must be integer class indices, got {targets.dtype}")
        wrong = ((targets < MISSING) | (targets >= self.num_classes)).any(dim=0)  # [G]
        if bool(wrong.any()):
            names = [name for name, bad in zip(self.table.group_names, wrong.tolist(), strict=True) if bad]
            raise ValueError(f"targets out of range (-1 to number of classes - 1) in the groups {first_few(names)}")
