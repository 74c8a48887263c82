# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Training loss: against a loop over the batch, gradients, masks, weights and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.loss import InjuryLoss

LABELS_FILE = Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json"
WEIGHTS = {"bowel": [1, 2], "extravasation": [1, 6], "kidney": [1, 2, 4], "liver": [1, 2, 4], "spleen": [1, 2, 4]}


def _batch(size: int = 6, seed: int = 0, masked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, 11, generator=generator, dtype=torch.float64)
    targets = [torch.randint(-1 if masked else 0, len(w), (size,), generator=generator) for w in WEIGHTS.values()]
    return logits, torch.stack(targets, dim=1)


def _slow(logits: torch.Tensor, targets: torch.Tensor, use_weights: bool = True, smoothing: float = 0.0) -> dict:
    """Item by item, in plain floats."""
    terms = {}
    for group, (name, weights) in enumerate(WEIGHTS.items()):
        start = sum(1 if len(w) == 2 else len(w) for w in list(WEIGHTS.values())[:group])
        total = 0.0
        for z, target in zip(logits.tolist(), targets[:, group].tolist(), strict=True):
            if target == -1:
                continue
            classes = len(weights)
            if classes == 2:
                p = 1 / (1 + math.exp(-z[start]))
                log_p = [math.log(1 - p), math.log(p)]
            else:
                norm = math.log(sum(math.exp(v) for v in z[start : start + classes]))
                log_p = [v - norm for v in z[start : start + classes]]
            hot = [(1 - smoothing) * (c == target) + smoothing / classes for c in range(classes)]
            loss = -sum(h * lp for h, lp in zip(hot, log_p, strict=True))
            total += loss * (weights[target] if use_weights else 1)
        terms[name] = total / len(logits)
    return terms


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans(), st.sampled_from([0.0, 0.1, 0.5]))
def test_equals_the_loop(seed, size, use_weights, smoothing):
    logits, targets = _batch(size, seed)
    loss = InjuryLoss(LABELS_FILE, use_weights=use_weights, label_smoothing=smoothing)
    slow = _slow(logits, targets, use_weights, smoothing)
    total = loss(logits, targets)
    assert total.ndim == 0
    assert total.item() == pytest.approx(sum(slow.values()), abs=1e-9)
    assert {name: term.item() for name, term in loss.last_terms.items()} == pytest.approx(slow, abs=1e-9)


def test_gradcheck():
    logits, targets = _batch(3)
    assert (targets == -1).any()
    loss = InjuryLoss(LABELS_FILE, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), (logits.requires_grad_(),))


def test_masked_groups_have_zero_gradient():
    logits, targets = _batch(masked=False)
    targets[:, 3] = -1  # liver, wholly
    targets[2] = -1  # one item, wholly
    logits.requires_grad_()
    loss = InjuryLoss(LABELS_FILE)
    loss(logits, targets).backward()
    assert loss.last_terms["liver"].item() == 0
    assert torch.equal(logits.grad[:, 5:8], torch.zeros(6, 3, dtype=torch.float64))
    assert torch.equal(logits.grad[2], torch.zeros(11, dtype=torch.float64))
    assert (logits.grad[[0, 1, 3, 4, 5]][:, [0, 1, 2, 3, 4, 8, 9, 10]] != 0).all()


def test_everything_masked_still_backpropagates():
    logits = torch.randn(2, 11, requires_grad=True)
    total = InjuryLoss(LABELS_FILE)(logits, torch.full((2, 5), -1))
    total.backward()
    assert total.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 11))


def test_extravasation_is_trained_with_weight_six():
    """A head that the score weighs most must not be left out."""
    targets = torch.tensor([[0, 1, 0, 0, 0]])
    terms = InjuryLoss(LABELS_FILE).terms(torch.zeros(1, 11), targets)
    assert terms["extravasation"].item() == pytest.approx(6 * math.log(2))
    assert terms["bowel"].item() == pytest.approx(math.log(2))
    assert terms["liver"].item() == pytest.approx(math.log(3))


def test_parts_add_up_to_the_whole():
    """Accumulated or distributed halves of a batch equal the batch, whatever is masked in each."""
    logits, targets = _batch(8)
    loss = InjuryLoss(LABELS_FILE)
    halves = (loss(logits[:4], targets[:4]) + loss(logits[4:], targets[4:])) / 2
    torch.testing.assert_close(halves, loss(logits, targets))


def test_accepts_metatensor_half_and_int32():
    logits, targets = _batch()
    loss = InjuryLoss(LABELS_FILE)
    found = loss(MetaTensor(logits.bfloat16()), MetaTensor(targets.int()))
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(logits, targets).item(), rel=0.02)


def test_last_terms_are_detached_and_no_state_is_saved():
    logits, targets = _batch()
    loss = InjuryLoss(LABELS_FILE)
    loss(logits.requires_grad_(), targets)
    assert list(loss.last_terms) == list(WEIGHTS)
    assert not any(term.requires_grad for term in loss.last_terms.values())
    assert not loss.state_dict()


def test_single_organ_and_two_class_tables():
    logits, targets = _batch(masked=False)
    whole = InjuryLoss(LABELS_FILE).terms(logits, targets)
    liver = InjuryLoss(LABELS_FILE, groups=["liver"])
    torch.testing.assert_close(liver(logits[:, 5:8], targets[:, 3:4]), whole["liver"])
    bowel = InjuryLoss(LabelTable.from_file(LABELS_FILE), groups=["bowel"])
    torch.testing.assert_close(bowel(logits[:, :1], targets[:, :1]), whole["bowel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z[:, :10], y), r"logits \[B, 11\] and targets \[B, 5\], got \(6, 10\) and \(6, 5\)"),
        (lambda z, y: (z, y[:, 0]), r"got \(6, 11\) and \(6,\)"),
        (lambda z, y: (z, y[:5]), "6 logits rows for 5 target rows"),
        (lambda z, y: (z[:0], y[:0]), "0 logits rows"),
        (lambda z, y: (z, y.float()), "integer class indices"),
        (lambda z, y: (z, torch.full_like(y, 2)), "out of range .* bowel, extravasation$"),
        (lambda z, y: (z, torch.full_like(y, -2)), "out of range"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        InjuryLoss(LABELS_FILE)(*change(*_batch()))


def test_refuses_smoothing():
    with pytest.raises(ValueError, match="label_smoothing"):
        InjuryLoss(LABELS_FILE, label_smoothing=1.0)
