# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What several processes compute together, each part against one process with all items. All in one group of three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler
from monai.transforms import Compose
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workflow.dataset import PreparationError, SlabDataset
from workflow.distributed import SharedBuffers
from workflow.gather import in_rank_order, ranks, rows_of_all, sum_over_ranks
from workflow.global_mean import GlobalMean
from workflow.sampler import EpochSampler
from workflow.training import LossMeans, Validation

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.loss import InjuryLoss
from bundles.rsna_cnn_lstm.scripts.patient_score import PatientScore
from bundles.rsna_cnn_lstm.scripts.slice_loss import InjurySliceLoss
from bundles.voco2d_pretrain.scripts.health import EmbeddingSpread, PositionAccuracy, SliceHeight, embeddings_and_labels
from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.partner import partner_rule
from tests.workflow.ranks import in_processes

RANKS = 3
TABLE = LabelTable.from_file(Path(__file__).parents[2] / "bundles/rsna_cnn_lstm/configs/labels.json")
CROPS, BASES, WIDTH = 2, 4, 6


def own(items: Sequence) -> Sequence:
    """This process's share."""
    rank, size = ranks()
    return items[rank::size]


def gathering() -> None:
    rank, size = ranks()
    for number in (0, 1, 2, 3, 7):
        assert in_rank_order(own(list(range(number)))) == list(range(number))
    whole = torch.arange(28.0).view(7, 2, 2)
    mine = own(whole).clone().requires_grad_()
    weights = torch.randn(7, 2, 2, generator=torch.Generator().manual_seed(rank))
    found = rows_of_all(mine)
    assert torch.equal(found, whole)
    (found * weights).sum().backward()  # each process has a loss of its own on all rows
    assert torch.allclose(mine.grad, own(sum_over_ranks(weights)))
    wrong = 1 if rank else 4
    with pytest.raises(ValueError, match=f"rank {rank} of 3: expected 2 of 6 rows, got {wrong}"):
        rows_of_all(torch.zeros(wrong, 1))
    assert size == RANKS


Call = Callable[[nn.Module, list[Tensor], Tensor], Tensor]


def loss_and_gradient(loss: nn.Module, predicted: list[Tensor], rows: Tensor, call: Call) -> list[Tensor]:
    leaves = [p.clone().requires_grad_() for p in predicted]
    value = call(loss, leaves, rows)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves), *loss.last_terms.values()]


def same_loss(loss: nn.Module, shared: nn.Module, predicted: list[Tensor], call: Call) -> None:
    """The mean of the processes' losses, gradients and terms is one process's, of `call` on those rows."""
    rows = torch.arange(len(predicted[0]))
    expected = loss_and_gradient(loss, predicted, rows, call)
    found = loss_and_gradient(shared, predicted, own(rows), call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(sum_over_ranks(one) / RANKS, other)


def losses() -> None:
    torch.manual_seed(0)
    for number in (3, 4, 5, 9):  # items among three processes
        student, teacher = torch.randn(2, number, CROPS + BASES, WIDTH, dtype=torch.float64)
        overlap = torch.rand(number, CROPS, BASES, dtype=torch.float64)
        logits = torch.randn(number, TABLE.num_logits, dtype=torch.float64)
        of_slices = torch.randn(number, 2, TABLE.num_logits, dtype=torch.float64)
        label = torch.randint(-1, 2, (number, len(TABLE.groups)))  # -1: masked
        slice_label = torch.randint(-1, 2, (number, 2, len(TABLE.slice_groups)))
        calls: dict[str, Call] = {
            "voco": lambda f, x, i, t=teacher, y=overlap: f({"student": x[0][i], "teacher": t[i]}, y[i]),
            "injury": lambda f, x, i, y=label: f(x[0][i], y[i]),
            "slices": lambda f, x, i, y=label, z=slice_label: f((x[0][i], x[1][i]), (y[i], z[i])),
        }
        for form in ("v1", "v2"):
            across = VoCoLoss(form, partner=partner_rule(across_ranks=True))
            same_loss(VoCoLoss(form), GlobalMean(across), [student], calls["voco"])
        same_loss(InjuryLoss(TABLE), GlobalMean(InjuryLoss(TABLE)), [logits], calls["injury"])
        both = [InjurySliceLoss(InjuryLoss(TABLE), 0.5) for _ in range(2)]
        same_loss(both[0], GlobalMean(both[1]), [logits, of_slices], calls["slices"])


class Embeddings(nn.Module):
    """A network that has computed already."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"student": x, "teacher": x.flip(1), "slices": x[:, :5]}


def as_batch(items: list[dict]) -> dict:
    return {key: [i[key] for i in items] if isinstance(items[0][key], str) else torch.stack([i[key] for i in items])
            for key in items[0]}  # fmt: skip


def evaluator(items: list[dict], sampler: EpochSampler, key: str, metrics: dict, network: nn.Module) -> Engine:
    loader = DataLoader(items, batch_size=2, sampler=sampler, collate_fn=as_batch)
    (name, first), *others = metrics.items()
    return SupervisedEvaluator(
        torch.device("cpu"), loader, network, key_val_metric={name: first}, additional_metrics=dict(others),
        prepare_batch=lambda batch, *_, **__: (batch[key], batch["label"]), decollate=False,
    )  # fmt: skip


def health() -> dict:
    kinds = {"accuracy": PositionAccuracy, "spread": EmbeddingSpread, "height": SliceHeight}
    return {
        name: IgniteMetricHandler(kind(), output_transform=embeddings_and_labels, save_details=False)
        for name, kind in kinds.items()
    }


def figures() -> list[dict[str, float]]:
    """Of held-out items, of which a process may have none; called in one process and in several."""
    found = []
    for number in (1, 2, 3, 7):
        torch.manual_seed(number)
        volumes = [{"x": torch.randn(CROPS + BASES, WIDTH), "label": torch.rand(CROPS, BASES)} for _ in range(number)]
        series = [
            {"x": torch.randn(TABLE.num_logits), "label": torch.randint(0, 2, (len(TABLE.groups),)),
             "patient_id": f"p{i // 2}", "series_id": f"s{number - i}"} for i in range(number)
        ]  # fmt: skip
        parts = (volumes, health(), Embeddings()), (series, {"score": PatientScore(TABLE)}, nn.Identity())
        for items, metrics, network in parts:
            sampler = EpochSampler(number, shuffle=False, fill=False)
            engine = evaluator(items, sampler, "x", metrics, network)
            trainer = Engine(lambda *_: None)
            Validation(1, engine).attach(trainer)
            trainer.run([0], max_epochs=2)
            assert engine.state.epoch == 2
            found.append({**engine.state.metrics, "best": engine.state.best_metric})
    return found


def means() -> dict[str, float]:
    """Of the loss over an epoch; each process has its own values."""
    values = torch.tensor([1.0, 2.0, 4.0]) * (1 + ranks()[0])
    loss = nn.Module()
    loss.last_terms = {}

    def step(engine: Engine, value: Tensor) -> dict[str, Tensor]:
        loss.last_terms = {"part": value / 2}
        return {"loss": value}

    trainer = Engine(step)
    LossMeans(loss).attach(trainer)
    trainer.run(values, max_epochs=1)
    return dict(trainer.state.metrics)


def buffers() -> list[float]:
    """Of BN without synchronisation."""
    engine = Engine(lambda *_: None)
    engine.network = nn.BatchNorm1d(1)
    engine.network.running_mean.fill_(ranks()[0] + 1)
    SharedBuffers().attach(engine)
    engine.run([0])
    return engine.network.running_mean.tolist()


class Read:
    """What stands in a file; notes that it was asked."""

    def __call__(self, data: dict) -> dict:
        path = Path(data["image"])
        with (path.parent / "reads" / path.stem).open("a") as log:
            log.write("x")
        if path.read_text() == "bad":
            raise ValueError(f"{path.name} is bad")
        return {**data, "image": MetaTensor(torch.full((1, 2, 2, 2), int(path.read_text()), dtype=torch.uint8))}


def preparation(folder: str) -> list:
    data = [{"image": str(path), "series_id": path.stem} for path in sorted(Path(folder).glob("*.txt"))]
    dataset = SlabDataset(data, Compose([Read()]), cache_dir=f"{folder}/cache")
    with pytest.raises(PreparationError, match="2 of 7 series cannot be used"):
        dataset.prepare_all()
    dataset.skip_failed = True
    dataset.prepare_all()
    values = [int(dataset[i]["image"].max()) for i in range(len(dataset))]
    return [len(dataset), sorted(Path(path).name for path, _ in dataset.failed), values]


def together(folder: str) -> dict:
    gathering()
    losses()
    return {"figures": figures(), "means": means(), "buffers": buffers(), "prepared": preparation(folder)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of three processes finds; losses and gathered rows they hold against one process by themselves."""
    folder = tmp_path_factory.mktemp("series")
    (folder / "reads").mkdir()
    for number in range(7):
        (folder / f"{number}.txt").write_text("bad" if number in (2, 3) else str(number))
    results = in_processes(RANKS, tmp_path_factory.mktemp("ranks"), together, str(folder))
    return [{**result, "folder": folder} for result in results]


def test_figures_are_those_of_one_process_on_every_rank(found):
    expected = figures()
    for result in found:
        for one, other in zip(result["figures"], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-6, nan_ok=True)


def test_the_mean_loss_is_over_all_processes(found):
    value = (7 / 3) * 2
    assert all(r["means"] == pytest.approx({"loss": value, "loss_part": value / 2}) for r in found)


def test_validation_has_the_buffers_of_the_weights_that_are_saved(found):
    assert [r["buffers"] for r in found] == [[1.0]] * RANKS


def test_preparation_is_shared_and_all_know_its_result(found):
    assert all(r["prepared"] == [5, ["2.txt", "3.txt"], [0, 1, 4, 5, 6]] for r in found)
    # a good series once; a bad one at each of two calls
    reads = {path.name: len(path.read_text()) for path in (found[0]["folder"] / "reads").iterdir()}
    assert reads == {str(i): 2 if i in (2, 3) else 1 for i in range(7)}


def test_in_one_process_everything_is_as_it_is():
    x = torch.randn(3, 2)
    assert ranks() == (0, 1)
    assert in_rank_order([1, 2]) == [1, 2]
    assert rows_of_all(x) is x
    assert sum_over_ranks(x) is x
    loss, shared = InjuryLoss(TABLE), GlobalMean(InjuryLoss(TABLE))
    logits, label = torch.randn(2, TABLE.num_logits), torch.zeros(2, len(TABLE.groups), dtype=torch.long)
    assert shared(logits, label) == loss(logits, label)
    assert shared.last_terms == loss.last_terms
    rule = partner_rule(across_ranks=True)
    base = torch.randn(3, 4, 2)
    assert torch.equal(rule(base), base.roll(-1, 0))
    assert rule(base[:1]) is None
