# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A pretraining of a tiny network with every handler that has state, and what must be the same after a resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.optimizers import WarmupCosineSchedule
from torch import nn
from torch.utils.data import DataLoader, Dataset
from workflow.checkpoint import Checkpoints
from workflow.dataset import collate_plain
from workflow.sampler import EpochSampler
from workflow.training import GradientClipping, LossMeans, StopAtNonFiniteLoss

from bundles.voco2d_pretrain.scripts.batch import PrepareCrops
from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage, TeacherUpdate

ITEMS, BATCH, EPOCHS = 7, 2, 4


class Cnn(nn.Module):
    """A small backbone with BN and dropout."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(dim=(2, 3))


class Crops(Dataset):
    """`poison`: the number whose crops give no finite loss."""

    def __init__(self, poison: int | None = None) -> None:
        self.seen: list[int] = []
        self.poison = poison

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self.seen.append(number)
        generator = torch.Generator().manual_seed(number)
        base = torch.randint(0, 256, (2, 2, 2, 1, 6, 6), dtype=torch.uint8, generator=generator)
        overlap = torch.rand(2, 4, generator=generator)
        overlap /= overlap.sum(dim=1, keepdim=True)
        if self.poison is not None:  # as PrepareCrops makes it of bytes, so that the values are the same
            base = base.float().div_(255.0) * (np.nan if number == self.poison else 1.0)
        return {"random_crops": base[0], "base_crops": base, "overlap": overlap, "series_id": f"series_{number}"}


def run(
    folder: Path,
    epochs: int,
    resume: str | None = None,
    *,
    seed: int = 0,
    total: int = EPOCHS,
    batch: int = BATCH,
    workers: int = 0,
    accumulation: int = 1,
    every_steps: int | None = None,
    keep: int = 2,
    learning_rate: float = 0.01,
    poison: int | None = None,
) -> tuple[dict[str, Any], SupervisedTrainer]:
    """Pretrain a tiny network; everything that must be the same after a resume, and the trainer."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    sampler = EpochSampler(ITEMS, seed=1)
    crops = Crops(poison)
    loader = DataLoader(
        crops,
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        collate_fn=collate_plain,
    )
    steps = total * -(-len(loader) // accumulation)
    voco = VoCoNetwork(Cnn(), hidden=8, out=8, average=MomentumAverage((0.5, 0.9), steps))
    optimizer = torch.optim.AdamW(voco.student.parameters(), lr=learning_rate, amsgrad=True)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=total * len(loader))
    loss, losses, reports = VoCoLoss(), [], []
    means = LossMeans(loss)
    objects = {"network": voco, "optimizer": optimizer, "lr_scheduler": scheduler, "loss_means": means}
    checkpoints = Checkpoints(
        str(folder),
        objects,
        sampler=sampler,
        resume=resume,
        keep=keep,
        every_steps=every_steps,
        accumulation_steps=accumulation,
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=voco,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=PrepareCrops(),
        accumulation_steps=accumulation,
        optim_set_to_none=True,
        decollate=False,
        train_handlers=[
            LrScheduleHandler(scheduler, print_lr=False, epoch_level=False),
            GradientClipping(optimizer, 1.0),
            TeacherUpdate(voco, optimizer),
            StopAtNonFiniteLoss(optimizer),
            means,
            checkpoints,
        ],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: reports.append(dict(e.state.metrics)))
    trainer.run()
    after = {
        "network": voco.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
        "random": [torch.rand(3), np.random.rand(3), random.random()],  # noqa: NPY002
        "iteration": trainer.state.iteration,
        "losses": losses,
        "reports": reports,
        "seen": crops.seen,
    }
    return after, trainer


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, at any depth."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        assert np.array_equal(np.asarray(found), np.asarray(expected), equal_nan=True), where
    else:
        assert found == expected, where
