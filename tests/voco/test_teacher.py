# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How the teacher moves: once after each optimizer step, by a momentum that the step alone decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import Tensor, nn
from workflow.checkpoint import Checkpoints

from bundles.voco2d_pretrain.scripts.batch import PrepareCrops
from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage, StudentWeights, TeacherUpdate

CPU = torch.device("cpu")


class Cnn(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)).relu().mean(dim=(2, 3))


def network(momentum: float | tuple[float, float] = 0.9, total: int = 10) -> VoCoNetwork:
    torch.manual_seed(1)
    return VoCoNetwork(Cnn(), hidden=8, out=8, average=MomentumAverage(momentum, total))


def data(batches: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "random_crops": torch.rand(2, 2, 2, 1, 6, 6, generator=generator),
            "base_crops": torch.rand(2, 2, 2, 2, 1, 6, 6, generator=generator),
            "overlap": torch.rand(2, 2, 4, generator=generator),
        }
        for _ in range(batches)
    ]


def snapshot(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trainer(voco: VoCoNetwork, batches: int = 4, accumulation: int = 1, epochs: int = 1) -> SupervisedTrainer:
    optimizer = torch.optim.AdamW(voco.student.parameters(), lr=0.05)
    return SupervisedTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=data(batches),
        network=voco,
        optimizer=optimizer,
        loss_function=VoCoLoss(),
        prepare_batch=PrepareCrops(),
        accumulation_steps=accumulation,
        decollate=False,
        train_handlers=[TeacherUpdate(voco, optimizer)],
    )


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9, 1.0])
def test_the_first_move_obeys_the_momentum_elementwise(momentum):
    voco = network(momentum)
    optimizer = torch.optim.SGD(voco.student.parameters(), lr=1.0)
    TeacherUpdate(voco, optimizer).attach(None)
    teacher = [p.clone() for p in voco.teacher.parameters()]
    batch, overlap = PrepareCrops()(data(1)[0])
    VoCoLoss()(voco.train()(batch), overlap).backward()
    optimizer.step()
    assert not same(snapshot(voco.student), teacher)
    for after, before, student in zip(voco.teacher.parameters(), teacher, voco.student.parameters(), strict=True):
        flat = zip(after.flatten().tolist(), before.flatten().tolist(), student.flatten().tolist(), strict=True)
        for found, t, s in flat:
            assert found == pytest.approx(momentum * t + (1 - momentum) * s, rel=1e-5, abs=1e-7)
    names = [name for name, _ in voco.teacher.named_parameters()]
    assert any("projector" in name for name in names)
    assert any("convolution" in name for name in names)


def test_every_move_obeys_the_schedule():
    voco = network((0.5, 1.0), total=4)
    engine, slow = trainer(voco, epochs=2), snapshot(voco.student)
    moves = []

    def follow(_: object) -> None:
        step = len(moves)
        momentum = 1.0 - 0.5 * 0.5 * (1 + math.cos(math.pi * min(step / 4, 1)))
        for i, student in enumerate(voco.student.parameters()):
            slow[i] = momentum * slow[i] + (1 - momentum) * student.detach()
        moves.append(momentum)
        for found, expected in zip(voco.teacher.parameters(), slow, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    engine.add_event_handler(Events.ITERATION_COMPLETED, follow)
    engine.run()
    assert moves[0] == 0.5
    assert moves[4:] == [1.0] * 4  # past the end of the ramp the teacher stands still
    assert int(voco.teacher.n_averaged) == 9


@pytest.mark.parametrize(("accumulation", "moving"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])])
def test_the_teacher_moves_with_the_optimizer_and_not_while_gradients_gather(accumulation, moving):
    voco = network()
    engine = trainer(voco, batches=5, accumulation=accumulation)
    before, moved = snapshot(voco.teacher), []

    def look(e: SupervisedTrainer) -> None:
        after = snapshot(voco.teacher)
        if not same(after, before):
            moved.append(e.state.iteration)
            before[:] = after

    engine.add_event_handler(Events.ITERATION_COMPLETED, look)
    engine.run()
    assert moved == moving
    assert int(voco.teacher.n_averaged) == 1 + len(moving)


def test_a_step_that_is_skipped_moves_nothing():
    voco = network()
    optimizer = torch.optim.AdamW(voco.student.parameters(), lr=0.05)
    TeacherUpdate(voco, optimizer).attach(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = snapshot(voco.teacher)
    loss = sum(parameter.square().sum() for parameter in voco.student.parameters())
    for factor, moves in ((math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(loss * factor).backward(retain_graph=True)
        scaler.step(optimizer)
        scaler.update()
        assert same(snapshot(voco.teacher), before) != moves


def test_evaluation_never_moves_the_teacher():
    voco = network()
    trainer(voco).run()
    before = {name: tensor.clone() for name, tensor in voco.state_dict().items()}
    evaluator = SupervisedEvaluator(
        device=CPU, val_data_loader=data(3), network=voco, prepare_batch=PrepareCrops(), decollate=False
    )
    evaluator.run()
    voco.train()
    with torch.no_grad():
        voco(PrepareCrops()(data(1)[0])[0])  # a forward pass in training mode is no step either
    after = voco.state_dict()
    for name, tensor in before.items():
        if name.startswith("teacher") and "num_batches_tracked" not in name:
            assert torch.equal(tensor, after[name]), name


def test_the_schedule_goes_on_after_a_state_dict_round_trip():
    voco = network((0.0, 1.0), total=6)
    trainer(voco, batches=3).run()
    resumed = network((0.0, 1.0), total=6)
    resumed.load_state_dict(voco.state_dict())
    for module in (voco, resumed):
        torch.manual_seed(3)
        for parameter in module.student.parameters():
            parameter.data.normal_()
        module.move_teacher()
    assert same(snapshot(voco.teacher), snapshot(resumed.teacher))
    assert int(resumed.teacher.n_averaged) == 5
    fresh = network((0.0, 1.0), total=6)
    for parameter, value in zip(fresh.student.parameters(), snapshot(voco.student), strict=True):
        parameter.data.copy_(value)
    fresh.move_teacher()  # step 0: a copy of the student
    assert not same(snapshot(fresh.teacher), snapshot(resumed.teacher))


@given(start=st.floats(0, 1), width=st.floats(0, 1), total=st.integers(1, 10**6), step=st.integers(0, 2 * 10**6))
@settings(deadline=None, max_examples=200)
def test_the_momentum_rises_from_start_to_end_and_depends_on_the_step_alone(start, width, total, step):
    end = start + (1 - start) * width
    average = MomentumAverage((start, min(end, 1.0)), total)
    value = average.at(step)
    assert start - 1e-9 <= value <= end + 1e-9
    assert average.at(step + 1) >= value - 1e-9
    assert value == MomentumAverage((start, min(end, 1.0)), total).at(step)
    assert average.at(0) == pytest.approx(start)
    assert average.at(total) == pytest.approx(end)


def test_a_fixed_momentum_and_the_half_way_point():
    assert {MomentumAverage(0.9, 7).at(step) for step in range(20)} == {0.9}
    assert MomentumAverage([0.5, 0.9], 10).at(5) == pytest.approx(0.7)
    assert MomentumAverage(0.9, 0).total_steps == 1


@pytest.mark.parametrize("momentum", [-0.1, 1.1, (0.9, 0.5), (0.5, 1.5)])
def test_a_momentum_that_is_none_is_refused(momentum):
    with pytest.raises(ValueError, match="ema_momentum: expected 0 <= start <= end <= 1, got"):
        MomentumAverage(momentum)


def test_student_and_teacher_start_from_a_weights_file(tmp_path):
    torch.manual_seed(9)
    source, voco = Cnn(), network()
    source.norm.running_mean.fill_(0.5)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    projector = snapshot(voco.student.projector)
    engine = Engine(lambda *_: None)
    StudentWeights(voco, str(tmp_path / "model.pt")).attach(engine)
    engine.run([0])
    loaded = voco.student.backbone.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in source.state_dict().items())
    assert same(projector, snapshot(voco.student.projector))
    teacher, student = voco.teacher.module.state_dict(), voco.student.state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())
    assert int(voco.teacher.n_averaged) == 1
    assert not any(parameter.requires_grad for parameter in voco.teacher.parameters())


def test_a_checkpoint_wins_over_the_weights_that_the_run_started_from(tmp_path):
    torch.manual_seed(9)
    torch.save(Cnn().state_dict(), tmp_path / "model.pt")

    def run(resume):
        voco, engine = network(), Engine(lambda *_: None)
        StudentWeights(voco, str(tmp_path / "model.pt")).attach(engine)
        Checkpoints(str(tmp_path / "checkpoints"), {"network": voco}, resume=resume).attach(engine)
        if resume is None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: voco.load_state_dict(moved))
        engine.run([0], max_epochs=1 if resume is None else 2)
        return voco.state_dict()

    moved = {name: tensor + 1 for name, tensor in network().state_dict().items()}
    run(None)
    found = run("latest")
    assert all(torch.equal(tensor, found[name]) for name, tensor in moved.items())


def test_no_weights_leave_student_and_teacher_as_they_were():
    voco, engine = network(), Engine(lambda *_: None)
    before = snapshot(voco)
    StudentWeights(voco, None).attach(engine)
    engine.run([0])
    assert same(before, snapshot(voco))
