# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The VoCo loss in its two published forms, on the similarities of all crops of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from .partner import next_in_batch

__all__ = ["VoCoLoss", "position_loss"]

EPS = 1e-6
FORMS = ("v1", "v2")


class _SoftClamp(torch.autograd.Function):
    """``clamp(x, 0, 1)`` whose gradient also reaches an x below 0, but only to raise it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient.masked_fill((x < 0.0) & (gradient > 0.0), 0.0)


def position_terms(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative part of the position loss (method: CE), over the last two dimensions.

    ``pos = sum(-y * log(1 - |y - l| + eps)) / (sum(y) + eps)``, ``neg = sum([y = 0] * l^2) / (#[y = 0] + eps)``.

    Args:
        labels: overlaps y in [0, 1], [..., R, K].
        logits: similarities l in [-1, 1], the same shape. Where l < y - 1 the logarithm is that of eps: the published
            formula has none there.
    """
    agreement = _SoftClamp.apply(1.0 - (labels - logits).abs())
    positive = -(labels * torch.log(agreement + EPS)).sum(dim=(-2, -1))
    empty = (labels == 0).to(logits.dtype)
    negative = (empty * logits.square()).sum(dim=(-2, -1))
    return positive / (labels.sum(dim=(-2, -1)) + EPS), negative / (empty.sum(dim=(-2, -1)) + EPS)


def position_loss(labels: Tensor, logits: Tensor) -> Tensor:
    """Sum of `position_terms`, one value a volume."""
    positive, negative = position_terms(labels, logits)
    return positive + negative


class VoCoLoss(nn.Module):
    """Contrast of random crops with the base crops of a grid (VoCo, CVPR 2024, section 3; 2D-VoCo, arXiv 2601.14593).

    With ``s``, ``t`` the student's and teacher's embeddings (random crops r, base crops k), ``y`` the overlaps:

    form ``v2`` (2D-VoCo; the default)
        ``intra = CE(y_b, cos(s_b^r, t_b^k))``,
        ``inter = CE(cos(t_b^r, t_b'^k), cos(s_b^r, s_b'^k))`` with ``b' = b + 1 mod B``. A batch of one volume has no
        partner: its inter term is 0.
    form ``v1`` (VoCo, CVPR)
        ``l = (cos(s^r, t^k) + cos(t^r, s^k)) / 2``, terms ``pos`` and ``neg`` of CE(y, l).
    both
        ``reg = mean over pairs i < j of relu(cos(s^i, s^j))^2`` over base crops.

    Args:
        form: ``v1`` or ``v2``.
        weights: of the terms by name (``intra``, ``inter``, ``reg``, ``pos``, ``neg``), default 1 each.
        clamp: of form v2, ``hard`` as published, ``clamp(cos, 0, 1)``, which gives no gradient to a positive pair with
            cos < 0; ``soft`` (the default) has the same values and lets the gradient through where it would raise such
            a cosine. Of form v1, ``soft`` takes l as it is, as published; ``hard`` is the relu of 3D VoCo's code.
        symmetric_reg: the regulariser's gradient flows to both crops of a pair (the default); False detaches the
            second, as published, which leaves the last base crop without any. The value is the same.
        partner: from the base crops' embeddings of the batch to those of each volume's b', see `scripts.partner`.
    """

    def __init__(
        self,
        form: str = "v2",
        *,
        weights: dict[str, float] | None = None,
        clamp: str = "soft",
        symmetric_reg: bool = True,
        partner: Callable[[Tensor], Tensor | None] = next_in_batch,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"voco_form: expected one of {FORMS}, got {form!r}")
        if clamp not in ("hard", "soft"):
            raise ValueError(f"clamp: expected 'hard' or 'soft', got {clamp!r}")
        names = ("intra", "inter", "reg") if form == "v2" else ("pos", "neg", "reg")
        unknown = set(weights or {}) - {"intra", "inter", "pos", "neg", "reg"}
        if unknown:
            raise ValueError(f"loss weights: form {form} has the terms {names}, got {sorted(unknown)}")
        self.form, self.clamp, self.symmetric_reg, self.partner = form, clamp, symmetric_reg, partner
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in names}
        self.last_terms: dict[str, Tensor] = {}

    def _limit(self, cosines: Tensor) -> Tensor:
        return cosines.clamp(0.0, 1.0) if self.clamp == "hard" else _SoftClamp.apply(cosines)

    def terms(self, embeddings: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Each term, unweighted, as a scalar.

        Args:
            embeddings: ``student`` and ``teacher``, [B, R+K, D], random crops first.
            labels: overlaps, [B, R, K].
        """
        number = labels.shape[1]
        # half precision is too coarse for log(1 - |y - l|); float64 is for golden values and gradient checks
        dtype = torch.promote_types(embeddings["student"].dtype, torch.float32)
        student = normalize(embeddings["student"].to(dtype), dim=-1)
        teacher = normalize(embeddings["teacher"].detach().to(dtype), dim=-1)
        labels = labels.to(dtype)
        if student.shape[1] != number + labels.shape[2]:
            raise ValueError(
                f"labels are of {number} random and {labels.shape[2]} base crops, found {student.shape[1]} embeddings"
            )
        random_s, base_s = student[:, :number], student[:, number:]
        random_t, base_t = teacher[:, :number], teacher[:, number:]
        cross = random_s @ base_t.mT  # (B, R, K)
        if self.form == "v1":
            similarity = (cross + random_t @ base_s.mT) / 2
            positive, negative = position_terms(labels, relu(similarity) if self.clamp == "hard" else similarity)
            return {"pos": positive.mean(), "neg": negative.mean(), "reg": self._regularisation(base_s)}
        inter = cross.new_zeros(())
        next_s, next_t = self.partner(base_s), self.partner(base_t)
        if next_s is not None and next_t is not None:
            target = (random_t @ next_t.mT).clamp(0.0, 1.0)
            inter = position_loss(target, self._limit(random_s @ next_s.mT)).mean()
        intra = position_loss(labels, self._limit(cross)).mean()
        return {"intra": intra, "inter": inter, "reg": self._regularisation(base_s)}

    def _regularisation(self, base: Tensor) -> Tensor:
        number = base.shape[1]
        first, second = torch.triu_indices(number, number, offset=1, device=base.device)
        gram = base @ (base if self.symmetric_reg else base.detach()).mT  # (B, K, K)
        return relu(gram[:, first, second]).square().mean()

    def forward(self, embeddings: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Weighted sum of the terms; the detached terms stay in ``last_terms`` for the log."""
        # autocast would compute the cosines in half precision again
        with torch.autocast(labels.device.type, enabled=False):
            terms = self.terms(embeddings, labels)
        self.last_terms = {name: value.detach() for name, value in terms.items()}
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
