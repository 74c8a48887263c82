# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A position in an epoch is one of its global order: any number of processes may go on from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from torch import nn
from workflow.progress import Progress, ScalerState, load_scheduler
from workflow.sampler import EpochSampler

SIZES = {"items": st.integers(1, 60), "batch": st.integers(1, 5), "world_size": st.integers(1, 4)}


def standing(items: int, batch: int, world_size: int, accumulation: int = 1) -> tuple[Progress, list[EpochSampler]]:
    """Progress of the first process of some, and the samplers of all."""
    samplers = [
        EpochSampler(items, seed=3, batch_size=batch, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    engine = Engine(lambda *_: None)
    engine.state.dataloader = SimpleNamespace(batch_size=batch)
    engine.state.epoch_length = -(-len(samplers[0]) // batch)
    return Progress(engine, samplers[0], accumulation), samplers


@settings(deadline=None, max_examples=200)
@given(
    old=st.tuples(SIZES["batch"], SIZES["world_size"]),
    new=st.tuples(SIZES["batch"], SIZES["world_size"], st.integers(1, 3)),
    items=SIZES["items"],
    epochs=st.integers(0, 3),
    data=st.data(),
)
def test_nothing_of_an_epoch_is_left_out_when_processes_and_batches_change(old, new, items, epochs, data):
    before, samplers = standing(items, *old)
    length = before.engine.state.epoch_length
    done = data.draw(st.integers(0, length - 1))
    before.engine.state.iteration = epochs * length + done
    for sampler in samplers:
        sampler.set_epoch(epochs)
    consumed = {number for sampler in samplers for number in list(sampler)[: done * old[0]]}
    saved = before.state_dict()
    assert saved["samples"] == done * old[0] * old[1] < items or done == 0

    after, samplers = standing(items, *new)
    after.load_state_dict(saved)
    state = after.engine.state
    assert state.epoch == state.iteration // state.epoch_length == epochs  # never an epoch too far
    assert after.is_between_steps()
    state.epoch += 1  # as Ignite does when an epoch starts
    after.start_epoch()
    skip = samplers[0].skip
    assert 0 <= done * old[0] * old[1] - skip < new[0] * new[1] * new[2]  # less than a step comes again
    for sampler in samplers:
        sampler.set_epoch(epochs, skip)
    rest = [number for sampler in samplers for number in sampler]
    assert {number % items for number in consumed | set(rest)} == set(range(items))
    steps = {-(-len(list(sampler)) // new[0]) for sampler in samplers}
    assert steps == {state.epoch_length - after.batches_of_epoch}  # no process waits for another
    if new == (*old, 1):
        assert not consumed & set(rest) or items % old[1]  # but for what fills up the shares
        assert state.iteration == epochs * length + done


@pytest.mark.parametrize("weights", [None, [1.0] * 9])
@pytest.mark.parametrize("skip", [0, 1, 4, 9])
def test_the_first_items_of_the_order_are_left_out(weights, skip):
    sampler = EpochSampler(9, seed=2, weights=weights)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, skip)
    assert list(sampler) == whole[skip:]
    assert len(sampler) == 9  # of a whole epoch, as schedules want it
    sampler.set_epoch(3)
    assert list(sampler) == whole


def test_what_has_no_sampler_has_a_position_too():
    engine = Engine(lambda *_: None)
    engine.run([1, 2, 3, 4], max_epochs=1)
    engine.state.iteration = 6
    progress = Progress(engine, None)
    progress.start_epoch()
    saved = progress.state_dict()
    assert (saved["epochs"], saved["samples"], saved["items"]) == (1, 2, None)
    engine.state.iteration = 0
    progress.load_state_dict(saved)
    assert (engine.state.epoch, engine.state.iteration) == (1, 6)


def test_a_position_needs_the_loaders_batch_size():
    engine = Engine(lambda *_: None)
    engine.state.dataloader = [1, 2]
    with pytest.raises(ValueError, match="expected one with a batch_size, found None"):
        _ = Progress(engine, EpochSampler(2)).samples_per_step


def test_the_gradient_scaler_is_state_where_there_is_one():
    engine, scale = Engine(lambda *_: None), {"scale": 64.0}
    state = ScalerState(engine)
    assert state.state_dict() == {}
    state.load_state_dict(scale)  # of a run on a GPU, gone on with on a CPU
    loaded = []
    engine.scaler = SimpleNamespace(state_dict=lambda: scale, load_state_dict=loaded.append)
    assert state.state_dict() == scale
    state.load_state_dict({})  # the other way round: it starts as a new one
    state.load_state_dict(scale)
    assert loaded == [scale]


def test_schedules_with_state_of_their_own_keep_it():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    first, second = (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) for _ in range(2))
    for value in (1.0, 2.0, 3.0):
        first.step(value)
    load_scheduler(second, first.state_dict(), 3, 3)
    assert second.state_dict() == first.state_dict()
    by_epoch = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    load_scheduler(by_epoch, {**by_epoch.state_dict(), "last_epoch": 2, "_step_count": 3}, 20, 10)
    assert (by_epoch.last_epoch, optimizer.param_groups[0]["lr"]) == (2, 0.25)
