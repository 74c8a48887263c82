# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Clipping, the stop at a loss that is no number, logged means, early stopping, parameter groups."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine, Events
from monai.engines import Evaluator, SupervisedTrainer
from torch import nn
from workflow.errors import NonFiniteError
from workflow.training import (
    EarlyStopping,
    GradientClipping,
    LossMeans,
    StopAtNonFiniteLoss,
    Validation,
    parameter_groups,
)


def batches(number: int, poison: int | None = None) -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(number):
        image = torch.randn(3, 5, generator=generator)
        label = torch.randn(3, 2, generator=generator) * 10
        made.append({"image": image, "label": label * (math.nan if i == poison else 1), "series_id": [f"s{i}"]})
    return made


class Squares(nn.Module):
    """A loss that keeps its terms, as ours do."""

    def __init__(self) -> None:
        super().__init__()
        self.last_terms: dict[str, torch.Tensor] = {}

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        terms = (pred - label).square().mean(dim=0)
        self.last_terms = {"first": terms[0].detach(), "second": terms[1].detach()}
        return terms.sum()


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[dict], **options: object
) -> SupervisedTrainer:
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=options.pop("max_epochs", 1),
        train_data_loader=data,
        network=model,
        optimizer=optimizer,
        loss_function=options.pop("loss", Squares()),
        decollate=False,
        **options,
    )


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_the_accumulated_gradient_is_clipped_once_a_step(accumulation, max_norm):
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    slow = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = batches(6)
    clipping = GradientClipping(optimizer, max_norm)
    trainer(model, optimizer, data, accumulation_steps=accumulation, train_handlers=[clipping]).run()
    for start in range(0, 6, accumulation):
        group = data[start : start + accumulation]
        slow.zero_grad()
        loss = sum(Squares()(slow(batch["image"]), batch["label"]) for batch in group) / accumulation
        gradients = torch.autograd.grad(loss, list(slow.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 0.5  # otherwise nothing is tested
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for parameter, gradient in zip(slow.parameters(), gradients, strict=True):
                parameter -= 0.01 * factor * gradient
    for found, expected in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [None, 0])
def test_no_limit_clips_nothing(max_norm):
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    plain = copy.deepcopy(model)
    for module, handlers in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        trainer(module, optimizer, batches(3), train_handlers=[GradientClipping(optimizer, max_norm)] * handlers).run()
    assert torch.equal(model.weight, plain.weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_step(bad):
    model = nn.Linear(5, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    data = batches(4, poison=2)
    data[2]["label"] = torch.full((3, 2), bad)
    engine = trainer(model, optimizer, data, train_handlers=[StopAtNonFiniteLoss()])
    with pytest.raises(FloatingPointError, match=rf"loss is {bad} at iteration 3 \(epoch 1\), series \['s2'\]"):
        engine.run()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(torch.isfinite(state["exp_avg"]).all() for state in optimizer.state.values())


def test_series_without_a_name_are_unknown():
    engine = Engine(lambda *_: None)
    engine.state.output = {"loss": torch.tensor(math.nan)}
    with pytest.raises(FloatingPointError, match="series unknown"):
        StopAtNonFiniteLoss()(engine)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_means_of_an_epoch_are_those_of_its_iterations(caplog, as_list):
    losses = [[1.0, 5.0], [2.0, 4.0, 6.0]]
    loss, seen = Squares(), []

    def step(engine: Engine, value: float) -> object:
        loss.last_terms = {"first": torch.tensor(value * 2)}
        output = {"loss": torch.tensor(value, requires_grad=True)}
        return [output] if as_list else output

    engine = Engine(step)
    LossMeans(loss).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))
    data = [value for epoch in losses for value in epoch]
    with caplog.at_level(logging.INFO):
        engine.run(data[:2], max_epochs=1)
        engine.run(data[2:], max_epochs=1)
    assert seen == [{"loss": 3.0, "loss_first": 6.0}, {"loss": 4.0, "loss_first": 8.0}]
    assert "epoch 1: loss 3.0000, loss_first 6.0000" in caplog.text


def test_the_terms_of_a_real_trainer_are_logged():
    loss, model, values = Squares(), nn.Linear(5, 2), []
    engine = trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), batches(3), loss=loss, max_epochs=2)
    LossMeans(loss).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: values.append(e.state.output["loss"].item()))
    engine.run()
    metrics = engine.state.metrics
    assert metrics["loss"] == pytest.approx(sum(values[3:]) / 3)
    assert metrics["loss_first"] + metrics["loss_second"] == pytest.approx(metrics["loss"])


@pytest.mark.parametrize(("interval", "validated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_the_last_epoch_is_always_validated(interval, validated):
    validator = Evaluator(
        device=torch.device("cpu"), val_data_loader=[{}], epoch_length=1, iteration_update=lambda *_: {}
    )
    epochs, engine = [], Engine(lambda *_: None)
    validator.add_event_handler(Events.COMPLETED, lambda: epochs.append(engine.state.epoch))
    Validation(interval=interval, validator=validator).attach(engine)
    engine.run([0], max_epochs=5)
    assert epochs == validated


def early(values: list[float], patience: int | None, start: dict | None = None) -> tuple[int, EarlyStopping]:
    """Epochs that a trainer ran whose validation gave these values."""
    validator, engine = Engine(lambda *_: None), Engine(lambda *_: None)
    stopper = EarlyStopping(validator, "score", patience)
    stopper.attach(engine)
    stopper.load_state_dict(start or {})

    def validate(trainer: Engine) -> None:
        validator.state.metrics["score"] = values[trainer.state.epoch - 1]
        validator.run([0])

    @validator.on(Events.EPOCH_COMPLETED)
    def measure(v: Engine) -> None:
        v.state.metrics["score"] = values[engine.state.epoch - 1]

    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    engine.run([0], max_epochs=len(values))
    return engine.state.epoch, stopper


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([1, 2, 1, 1, 5], 2, 4),
        ([1, 2, 1, 3, 1], 2, 5),
        ([3, 2, 1], 1, 2),
        ([3, 2, 1, 0], None, 4),
        ([1, math.nan, math.nan, 5], 2, 3),
        ([math.nan, 1, 2, 3], 2, 4),
    ],
)
def test_training_stops_when_the_metric_rises_no_more(values, patience, epochs):
    assert early(values, patience)[0] == epochs


def test_early_stopping_goes_on_counting_after_a_resume():
    _, first = early([5, 1], 3)
    state = first.state_dict()
    assert early([1, 1, 1, 1], 3, state)[0] == 2
    assert early([1, 1, 1, 1], None, state)[0] == 4  # the new run does not want it
    assert early([1, 1], None)[1].state_dict() == {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 1)


def test_parameter_groups():
    net = Net()
    for parameter in net.backbone[0].parameters():
        parameter.requires_grad_(False)
    assert [(len(g["params"]), g["lr"]) for g in parameter_groups(net, 0.1)] == [(4, 0.1)]
    groups = parameter_groups(net, 0.1, part_lr=0.01)
    assert [g["lr"] for g in groups] == [0.1, 0.01]
    assert [{id(p) for p in g["params"]} for g in groups] == [
        {id(p) for p in net.head.parameters()},
        {id(p) for p in net.backbone[1].parameters()},
    ]
    net.backbone.requires_grad_(False)
    assert [(len(g["params"]), g["lr"]) for g in parameter_groups(net, 0.1, part_lr=0.01)] == [(2, 0.1)]
    groups = parameter_groups(net, 0.1, part="head", part_lr=0.0)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(2, 0.0)]
    torch.optim.AdamW(groups)


def test_a_gradient_that_is_no_number_stops_before_the_step():
    """Of a loss that is one: the square root's slope at 0."""
    model = nn.Linear(5, 2)
    before = copy.deepcopy(model.state_dict())

    class Root(nn.Module):
        def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return (pred - pred.detach()).abs().sum().sqrt()

    optimizer = torch.optim.AdamW(model.parameters())
    handlers = [GradientClipping(optimizer, 1.0), StopAtNonFiniteLoss(optimizer)]
    engine = trainer(model, optimizer, batches(2), loss=Root(), train_handlers=handlers)
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is nan .* at iteration 1 .*series \['s0'\]"):
        engine.run()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_clipping_does_not_hide_gradients_whose_norm_is_infinite():
    """A factor of 0 would make a step of them that moves nothing."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(lambda *_: None)
    GradientClipping(optimizer, 1.0).attach(engine)
    optimizer.register_step_pre_hook(lambda *_: StopAtNonFiniteLoss(optimizer)._check_gradients(engine))
    model.weight.grad = torch.full((1, 2), 3e38)
    with pytest.raises(NonFiniteError, match="the norm of the gradient is inf"):
        optimizer.step()


def join(rank: int, path: str, results: Any) -> None:
    """One of two processes; the second's loss is bad."""
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    engine = Engine(lambda *_: None)
    engine.state.output = {"loss": torch.tensor(math.nan if rank else 1.0)}
    engine.state.batch = {"image": torch.ones(1), "series_id": [f"s{rank}"]}
    try:
        StopAtNonFiniteLoss()(engine)
    except NonFiniteError as error:
        results.put((rank, str(error)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_bad_loss_in_one_process_stops_all(tmp_path):
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=join, args=(rank, str(tmp_path / "meet"), results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    found = dict(results.get() for _ in processes)
    assert found[0].startswith("the loss is nan")
    assert found[0] == found[1]
    assert "one of the series of this step: ['s0', 's1']" in found[0]
    assert found[1].startswith("the loss is nan")


def test_early_stopping_that_has_stopped_stays_so(caplog):
    """A run that is resumed after its end trains no further epoch, unless it waits for longer now."""
    _, first = early([5, 1, 1, 1], 2)
    state = first.state_dict()
    for patience, counter in ((2, 2), (4, 2)):
        caplog.clear()
        engine, validator, epochs = Engine(lambda *_: None), Engine(lambda *_: None), []
        stopper = EarlyStopping(validator, "score", patience)
        stopper.attach(engine)
        engine.add_event_handler(Events.STARTED, lambda _, s=stopper: s.load_state_dict(state))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e, seen=epochs: seen.append(e.state.epoch))
        with caplog.at_level(logging.INFO):
            engine.run([0], max_epochs=2)
        assert stopper.state_dict()["counter"] == counter
        assert (epochs == []) == (patience == 2)
        assert ("nothing left to do: score had not risen for 2 validations" in caplog.text) == (patience == 2)


def test_the_means_of_an_epoch_go_on_after_a_resume():
    loss, values = Squares(), [1.0, 2.0, 4.0, 9.0]

    def step(engine: Engine, value: float) -> dict[str, torch.Tensor]:
        loss.last_terms = {}
        return {"loss": torch.tensor(value)}

    whole, means = Engine(step), LossMeans(loss)
    means.attach(whole)
    states = []
    whole.add_event_handler(Events.ITERATION_COMPLETED, lambda: states.append(means.state_dict()))
    whole.run(values)
    again, means = Engine(step), LossMeans(loss)
    means.attach(again)
    again.load_state_dict({"iteration": 3, "max_epochs": 1, "epoch_length": 4})
    means.load_state_dict(states[2])
    again.run(values[3:])
    assert again.state.metrics == whole.state.metrics == {"loss": 4.0}
