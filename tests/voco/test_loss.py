# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""VoCoLoss against reference values, and against a slow loop over every pair of crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bundles.voco2d_pretrain.scripts.loss import VoCoLoss, position_loss, position_terms

EPS = 1e-6
CHOICES = [
    (form, clamp, symmetric) for form in ("v1", "v2") for clamp in ("hard", "soft") for symmetric in (True, False)
]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def limited(c: Tensor, y: Tensor, clamp: str) -> Tensor:
    """Value of clamp(c, 0, 1); soft: below 0 the gradient is that of c where it is pulled up (y > 0), else none."""
    if 0 <= c <= 1:
        return c
    if c > 1:
        return torch.ones_like(c)
    return c - c.detach() if clamp == "soft" and y > 0 else torch.zeros_like(c)


def slow_ce(y: Tensor, values: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Positive and negative part of the position loss, pair by pair."""
    positive = negative = y.new_zeros(())
    weight = empty = 0.0
    for r, row in enumerate(values):
        for k, value in enumerate(row):
            agreement = 1 - (y[r, k] - value).abs()
            if agreement < 0:  # form v1 alone: no logarithm there, but a way out
                agreement = agreement - agreement.detach()
            positive = positive - y[r, k] * torch.log(agreement + EPS)
            weight += float(y[r, k])
            if y[r, k] == 0:
                negative = negative + value**2
                empty += 1
    return positive / (weight + EPS), negative / (empty + EPS)


def slow_terms(
    student: Tensor, teacher: Tensor, y: Tensor, form: str, clamp: str, symmetric: bool
) -> dict[str, Tensor]:
    batch, number, base = y.shape
    teacher = teacher.detach()
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value / batch

    for b in range(batch):
        random_s, base_s = student[b, :number], student[b, number:]
        random_t, base_t = teacher[b, :number], teacher[b, number:]
        pairs = [(r, k) for r in range(number) for k in range(base)]
        direct = {(r, k): cosine(random_s[r], base_t[k]) for r, k in pairs}
        if form == "v1":
            rows = [[(direct[r, k] + cosine(random_t[r], base_s[k])) / 2 for k in range(base)] for r in range(number)]
            if clamp == "hard":
                rows = [[torch.relu(value) for value in row] for row in rows]
            positive, negative = slow_ce(y[b], rows)
            add("pos", positive)
            add("neg", negative)
        else:
            rows = [[limited(direct[r, k], y[b, r, k], clamp) for k in range(base)] for r in range(number)]
            add("intra", sum(slow_ce(y[b], rows)))
            other = (b + 1) % batch
            target = torch.zeros_like(y[b])
            for r, k in pairs:
                target[r, k] = cosine(random_t[r], teacher[other, number + k]).clamp(0, 1)
            rows = [
                [limited(cosine(random_s[r], student[other, number + k]), target[r, k], clamp) for k in range(base)]
                for r in range(number)
            ]
            add("inter", sum(slow_ce(target, rows)) if batch > 1 else torch.zeros(()))
        total = 0.0
        for i in range(base):
            for j in range(i + 1, base):
                second = base_s[j] if symmetric else base_s[j].detach()
                total = total + torch.relu(cosine(base_s[i], second)) ** 2
        add("reg", total / (base * (base - 1) / 2))
    return sums


def example(batch: int, number: int = 2, base: int = 4, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, number + base, dim, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(batch, number + base, dim, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.rand(batch, number, base, dtype=torch.float64, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = 0.0
    return student, teacher, labels


@pytest.mark.parametrize(("form", "clamp", "symmetric"), CHOICES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_reference_values(golden_dir, name, form, clamp, symmetric):
    with np.load(golden_dir / f"voco_loss_{name}.npz") as file:
        golden = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    terms = ("intra", "inter", "reg") if form == "v2" else ("pos", "neg", "reg")
    loss = VoCoLoss(form, clamp=clamp, symmetric_reg=symmetric)
    total = loss({"student": golden["student"], "teacher": golden["teacher"]}, golden["labels"])
    expected = [golden[term if form == "v2" else f"v1_{term}"] for term in terms]
    distances = [abs(float(loss.last_terms[term] - value)) for term, value in zip(terms, expected, strict=True)]
    assert tuple(loss.last_terms) == terms
    if (name, form, clamp) == ("a", "v1", "hard"):  # 3D VoCo's relu on l: the reference has negative ones
        assert distances[0] > 1e-3
        assert distances[2] < 1e-6
    else:
        assert max(distances) < 1e-6
        assert abs(float(total - sum(expected))) < 1e-6


@pytest.mark.parametrize(("form", "clamp", "symmetric"), CHOICES)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_vectorised_loss_is_the_loop(batch, form, clamp, symmetric):
    for seed in range(3):
        student, teacher, labels = example(batch, seed=seed)
        loss = VoCoLoss(form, clamp=clamp, symmetric_reg=symmetric)
        terms = loss.terms({"student": student, "teacher": teacher}, labels)
        slow = slow_terms(student, teacher, labels, form, clamp, symmetric)
        assert set(terms) == set(slow)
        for name, value in terms.items():
            torch.testing.assert_close(value, slow[name].to(value.dtype), rtol=1e-10, atol=1e-10)
        (fast,) = torch.autograd.grad(sum(terms.values()), student)
        (expected,) = torch.autograd.grad(sum(slow.values()), student)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)


@given(
    batch=st.integers(1, 4), number=st.integers(1, 3), base=st.integers(2, 6), seed=st.integers(0, 999),
    form=st.sampled_from(["v1", "v2"]), symmetric=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_properties(batch, number, base, seed, form, symmetric):
    student, teacher, labels = example(batch, number, base, seed=seed)
    loss = VoCoLoss(form, symmetric_reg=symmetric)
    terms = loss.terms({"student": student, "teacher": teacher}, labels)
    assert all(torch.isfinite(value) and value >= -1e-5 for value in terms.values())
    # lengths of embeddings and the order of volumes (kept as a cycle) do not matter
    scaled = loss.terms({"student": student * 3, "teacher": teacher * 0.1}, labels)
    rolled = loss.terms({"student": student.roll(1, 0), "teacher": teacher.roll(1, 0)}, labels.roll(1, 0))
    order = torch.randperm(base, generator=torch.Generator().manual_seed(seed)) + number
    order = torch.cat([torch.arange(number), order])
    permuted = loss.terms(
        {"student": student[:, order], "teacher": teacher[:, order]}, labels[..., order[number:] - number]
    )
    for name, value in terms.items():
        for other in (scaled, rolled, permuted):
            torch.testing.assert_close(other[name], value)


def test_the_partner_is_the_next_volume_of_the_batch():
    student, teacher, labels = example(4)
    inter = VoCoLoss().terms({"student": student, "teacher": teacher}, labels)["inter"]
    random_crops = [0, 1]
    for b in range(4):  # gradient of one volume's random crops reaches the base crops of exactly one other
        values = []
        for partner in range(4):
            target = torch.stack([
                torch.stack([cosine(teacher[b, r], teacher[partner, 2 + k]).clamp(0, 1) for k in range(4)])
                for r in random_crops
            ])  # fmt: skip
            logits = torch.stack([
                torch.stack([cosine(student[b, r], student[partner, 2 + k]).clamp(0, 1) for k in range(4)])
                for r in random_crops
            ])  # fmt: skip
            values.append(position_loss(target, logits))
        if b == 0:
            sums = [torch.zeros(()) for _ in range(4)]
        for shift in range(4):
            sums[shift] = sums[shift] + values[(b + shift) % 4] / 4
    distances = [abs((value - inter).item()) for value in sums]
    assert distances[1] < 1e-12
    assert min(distances[0], distances[2], distances[3]) > 1e-3


def test_a_batch_of_one_has_no_inter_term_and_finite_gradients():
    student, teacher, labels = example(1)
    loss = VoCoLoss()
    loss({"student": student, "teacher": teacher}, labels).backward()
    assert loss.last_terms["inter"] == 0
    assert torch.isfinite(student.grad).all()
    assert student.grad[:, :2].any()


def opposed() -> tuple[Tensor, Tensor, Tensor]:
    """One random crop whose positive base crop points away from it (cosine < 0); another base crop at right angles."""
    student = torch.tensor([[[1.0, 0.0, 0.0], [-1.0, 0.2, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [-1.0, 0.2, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    return student, teacher, torch.tensor([[[0.9, 0.0]]], dtype=torch.float64)


@pytest.mark.parametrize(("form", "term"), [("v2", "intra"), ("v1", "pos")])
def test_the_soft_clamp_pulls_a_positive_pair_up_where_the_hard_one_leaves_it(form, term):
    student, teacher, labels = opposed()
    gradients = {}
    for clamp in ("hard", "soft"):
        terms = VoCoLoss(form, clamp=clamp).terms({"student": student, "teacher": teacher}, labels)
        (gradients[clamp],) = torch.autograd.grad(terms[term], student)
    assert cosine(student[0, 0], teacher[0, 1]) < 0
    assert not gradients["hard"][0, 0].any()
    assert gradients["soft"][0, 0].any()
    moved = student.detach() - 1e-3 * gradients["soft"]
    assert cosine(moved[0, 0], teacher[0, 1]) > cosine(student[0, 0], teacher[0, 1])


def test_a_pair_as_wrong_as_can_be_has_a_finite_loss_and_a_way_out():
    student = torch.tensor([[[1.0, 0.1], [-1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)  # l = -1 where y = 1: 1 - |y - l| is negative
    terms = VoCoLoss("v1").terms({"student": student, "teacher": student}, labels)
    assert torch.isfinite(terms["pos"])
    (gradient,) = torch.autograd.grad(terms["pos"], student)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@given(seed=st.integers(0, 9999))
@settings(deadline=None, max_examples=60)
def test_both_clamps_of_v2_have_the_same_value(seed):
    student, teacher, labels = example(3, seed=seed)
    hard, soft = (VoCoLoss(clamp=clamp)({"student": student, "teacher": teacher}, labels) for clamp in ("hard", "soft"))
    assert hard == soft


def test_the_symmetric_regulariser_reaches_the_last_base_crop():
    student = torch.rand(2, 6, 5, dtype=torch.float64).requires_grad_()  # all cosines positive
    for symmetric in (True, False):
        loss = VoCoLoss(weights={"intra": 0, "inter": 0}, symmetric_reg=symmetric)
        (gradient,) = torch.autograd.grad(loss({"student": student, "teacher": student}, torch.rand(2, 2, 4)), student)
        assert not gradient[:, :2].any()
        assert (gradient[:, 2:-1].abs().sum(dim=-1) > 1e-6).all()
        assert bool((gradient[:, -1].abs().sum(dim=-1) > 1e-6).all()) == symmetric
        assert symmetric or not gradient[:, -1].any()


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_weights_multiply_the_terms(form):
    student, teacher, labels = example(3)
    embeddings = {"student": student, "teacher": teacher}
    terms = VoCoLoss(form).terms(embeddings, labels)
    weights = dict(zip(terms, (0.5, 3.0, 0.0), strict=True))
    loss = VoCoLoss(form, weights=weights)
    torch.testing.assert_close(loss(embeddings, labels), sum(weights[name] * value for name, value in terms.items()))
    for name, value in loss.last_terms.items():
        assert not value.requires_grad
        assert torch.equal(value, terms[name])  # logged unweighted
    default = VoCoLoss(form, weights={next(iter(terms)): 2.0})(embeddings, labels)
    torch.testing.assert_close(default, sum(terms.values()) + next(iter(terms.values())))


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_the_teacher_gets_no_gradient(form):
    student, teacher, labels = example(3)
    VoCoLoss(form)({"student": student, "teacher": teacher}, labels).backward()
    assert teacher.grad is None
    assert student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_half_precision_is_computed_in_float32(dtype, form):
    student, teacher, labels = (tensor.detach().to(dtype) for tensor in example(3))
    student.requires_grad_()
    loss = VoCoLoss(form)
    value = loss({"student": student, "teacher": teacher}, labels)
    assert value.dtype == torch.float32
    wide = loss({"student": student.float(), "teacher": teacher.float()}, labels.float())
    assert torch.equal(value, wide)
    value.backward()
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_autocast_leaves_the_loss_in_float32(form):
    student, teacher, labels = (tensor.detach().float() for tensor in example(3))
    loss = VoCoLoss(form)
    expected = torch.stack(list(loss.terms({"student": student, "teacher": teacher}, labels).values())).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (student @ teacher.mT).dtype == torch.bfloat16
        found = loss({"student": student, "teacher": teacher}, labels)
    assert torch.equal(found, expected)


def test_perfect_and_opposite_positions_stay_finite():
    eye = torch.eye(4, dtype=torch.float64)
    student = torch.cat([eye[:2], eye])[None].requires_grad_()
    perfect = eye[:2][None]
    loss = VoCoLoss()
    value = loss({"student": student, "teacher": student}, perfect)
    assert value.abs() < 1e-5
    wrong = loss({"student": student, "teacher": student}, perfect.roll(1, dims=-1))
    assert wrong > 5  # log of epsilon, not infinity
    wrong.backward()
    assert torch.isfinite(student.grad).all()


def test_position_terms_of_a_pair_by_hand():
    positive, negative = position_terms(torch.tensor([[0.25, 0.0]]), torch.tensor([[0.75, 0.5]]))
    torch.testing.assert_close(positive, -torch.log(torch.tensor(0.5 + EPS)), rtol=1e-4, atol=0)
    torch.testing.assert_close(negative, torch.tensor(0.25), rtol=1e-4, atol=0)


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="labels are of 2 random and 9 base crops, found 10 embeddings"):
        VoCoLoss()({"student": torch.rand(1, 10, 4), "teacher": torch.rand(1, 10, 4)}, torch.rand(1, 2, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "v3"}, r"voco_form: expected one of \('v1', 'v2'\), got 'v3'"),
        ({"clamp": "none"}, "clamp: expected 'hard' or 'soft', got 'none'"),
        (
            {"weights": {"inta": 1.0}},
            r"loss weights: form v2 has the terms \('intra', 'inter', 'reg'\), got \['inta'\]",
        ),
    ],
)
def test_unknown_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VoCoLoss(**options)
