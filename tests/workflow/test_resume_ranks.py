# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes resume from one file, have random draws of their own, and end together with one message."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from workflow.checkpoint import Checkpoints
from workflow.errors import NonFiniteError
from workflow.gather import barrier, is_first, of_each, of_first, ranks
from workflow.sampler import EpochSampler
from workflow.training import LossMeans, StopAtNonFiniteLoss
from workflow.weights import WeightsError

from tests.workflow.ranks import in_processes

ITEMS = 8


class Squares(nn.Module):
    """A loss that keeps its terms, as ours do."""

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        value = (pred - label).square().mean()
        self.last_terms = {"part": value.detach()}
        return value


def train(
    folder: str,
    epochs: int,
    resume: str | None = None,
    *,
    poison: int | None = None,
    start: float | None = None,
    every_steps: int | None = 1,
) -> SupervisedTrainer:
    """A few steps; `start`: what this process puts into its weights at the start, as a loader of weights does."""
    torch.manual_seed(0)
    network, sampler = nn.Linear(1, 1), EpochSampler(ITEMS, shuffle=False, batch_size=2)
    items = [
        {"image": torch.tensor([math.nan if i == poison else 1.0]), "label": torch.ones(1), "series_id": f"s{i}"}
        for i in range(ITEMS)
    ]
    loader = DataLoader([*items] * epochs, batch_size=2, sampler=sampler)
    optimizer, loss = torch.optim.SGD(network.parameters(), lr=0.1), Squares()
    means = LossMeans(loss)
    objects = {"network": network, "optimizer": optimizer, "loss_means": means}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=epochs, train_data_loader=loader, loss_function=loss,
        network=DistributedDataParallel(network) if ranks()[1] > 1 else network, optimizer=optimizer, decollate=False,
        train_handlers=[StopAtNonFiniteLoss(optimizer), means],
    )  # fmt: skip
    if start is not None:
        trainer.add_event_handler(Events.STARTED, lambda _: network.weight.data.fill_(start))
    Checkpoints(folder, objects, sampler=sampler, resume=resume, every_steps=every_steps, keep=9).attach(trainer)
    trainer.means, trainer.draws = [], None

    def note(engine: Engine) -> None:
        engine.draws = torch.rand(3) if engine.draws is None else engine.draws
        trainer.means.append(means.count)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    return trainer


def failing(kind: type[Exception], *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        train(*arguments, **options)
    barrier()
    return str(caught.value)


def together(root: str) -> dict:
    rank, _ = ranks()
    assert of_each(rank) == [0, 1]
    assert of_first(rank) == 0
    assert is_first() == (rank == 0)
    folder = Path(root) / "run"
    trained = train(str(folder), 2)
    barrier()
    found = {"iteration": trained.state.iteration}
    # a folder that the second process does not see: it asks the first
    blind = str(folder) if rank == 0 else str(Path(root) / "nowhere")
    again = train(blind, 3, "latest")
    barrier()
    found |= {"resumed": again.state.iteration, "draws": again.draws}
    within = train(str(Path(root) / "within"), 3, str(folder / "checkpoint_3.pt"))
    barrier()
    found["counts"] = within.means
    found["empty"] = train(str(Path(root) / "empty"), 1, "latest").state.iteration
    barrier()
    found["weights"] = failing(WeightsError, str(Path(root) / "a"), 1, start=float(rank))
    (Path(root) / "damaged").mkdir(exist_ok=True)
    (Path(root) / "damaged" / "checkpoint_1.pt").write_bytes(b"")
    barrier()
    found["damaged"] = failing(WeightsError, str(Path(root) / "damaged"), 1, "latest")
    found["other"] = failing(WeightsError, str(Path(root) / "b"), 1, str(Path(root) / f"gone{rank}.pt"))
    found["bad"] = failing(NonFiniteError, str(Path(root) / "bad"), 1, poison=5, every_steps=None)
    # of the second process, in step 2
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    root = tmp_path_factory.mktemp("together")
    return in_processes(2, tmp_path_factory.mktemp("ranks"), together, str(root)), root


def test_all_go_on_from_the_file_that_the_first_finds(found):
    for result in found[0]:
        assert (result["iteration"], result["resumed"], result["empty"]) == (4, 6, 2)


def test_random_draws_after_a_resume_are_each_process_s_own(found):
    first, second = found[0]
    assert not torch.equal(first["draws"], second["draws"])


def test_means_of_an_epoch_that_is_gone_on_with_are_those_since(found):
    assert [result["counts"] for result in found[0]] == [[1, 1, 2]] * 2


def test_sums_of_several_processes_are_not_gone_on_with_by_one():
    means = LossMeans(Squares())
    for world_size, count in ((1, 3), (2, 0)):
        means.load_state_dict({"sums": {"loss": torch.ones(())}, "count": 3, "world_size": world_size})
        assert (means.count, len(means.sums)) == (count, bool(count))


def test_what_differs_or_cannot_be_read_ends_all_with_one_message(found):
    results, root = found
    for result in results:
        assert result["weights"].startswith("the processes start from different weights (rank 0: iteration 0, checksum")
        newest = f"{root / 'damaged' / 'checkpoint_1.pt'}: not readable as a weights file: EOFError: "
        assert result["damaged"] == f"resume: none of the 1 checkpoints in {root / 'damaged'} is whole: {newest}"
        assert f"{root / 'gone0.pt'}: not readable" in result["other"]
    assert results[0]["weights"] == results[1]["weights"]


def test_the_message_of_a_bad_loss_names_the_series_of_all(found):
    results, root = found
    for result in results:
        assert (
            "the loss is nan at iteration 2 (epoch 1), one of the series of this step: ['s5', 's7', 's4', 's6']"
            in (result["bad"])
        )
        assert "their input is not finite: ['s5', 's7']" in result["bad"]
    path = root / "bad" / "checkpoint_1.rescued.pt"
    assert f"The state before that step is in {path}: --resume latest" in results[0]["bad"]
    assert torch.load(path, weights_only=True)["progress"]["iteration"] == 1
