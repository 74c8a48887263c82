# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of pretraining and its position accuracy, made of the bundle's own parts, for benchmarks that decide themselves
which volumes a step sees and when to stop. For processes of `common.in_bundle`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from .bundle_parts import parse

Batch = Mapping[str, Any]


def series_dataset(parser: ConfigParser, series: Sequence[str], part: str, cache: str) -> Any:
    """Prepared volumes with the crops of the config's ``train`` or ``validate``; the windows of the latter are the same
    for every seed. (Item number n is series n modulo their number, and n decides its windows.)"""
    from workflow.dataset import SlabDataset

    data = [{"image": path, "series_id": Path(path).name} for path in series]
    prepare, transform = (parser.get_parsed_content(name) for name in ("prepare", f"{part}#preprocessing"))
    seed = parser["seed"] if part == "train" else 0
    dataset = SlabDataset(data, prepare, transform, cache_dir=cache, seed=seed)
    dataset.prepare_all()
    return dataset


def collated(dataset: Any, numbers: Sequence[int]) -> dict[str, Any]:
    """A batch of these items."""
    from workflow.dataset import collate_plain

    return collate_plain([dataset[number] for number in numbers])


class Pretraining:
    """Network, loss, optimizer and schedule of the bundle's configs, stepped as its trainer does.

    Args:
        configs, settings: as in `bundle_parts.parse`.
        steps: length of the schedules of learning rate and teacher.
        replaced: parts of the configs below the top level, as id and value.
    """

    def __init__(
        self, configs: Sequence[str], settings: Mapping[str, Any], steps: int, replaced: Mapping[str, Any] | None = None
    ) -> None:
        from ignite.utils import manual_seed

        parser = parse(configs, settings)
        lengths = {
            "voco#average#total_steps": steps,
            "train#lr_scheduler#t_total": steps,
            "train#lr_scheduler#warmup_steps": int(parser["warmup_fraction"] * steps),
        }
        for name, value in {**lengths, **(replaced or {})}.items():
            parser[name] = value
        manual_seed(parser["seed"])
        self.parser: ConfigParser = parser
        self.device: torch.device = self.part("engine_device")
        self.network, self.loss, self.optimizer = map(self.part, ("network", "loss", "optimizer"))
        self.schedule = self.part("train#lr_scheduler")
        self.prepare_batch = self.part("train#prepare_batch")
        self.amp: bool = self.part("train#trainer#amp")
        self.grad_clip: float | None = parser["grad_clip"]

    def part(self, name: str) -> Any:
        """What the config makes under this id."""
        return self.parser.get_parsed_content(name)

    def step(self, batch: Batch, advance: bool = True) -> float:
        """One step of the optimizer and of the teacher; returns the loss, so a GPU is done with it.

        Args:
            advance: the schedule by one step too.

        Raises:
            FloatingPointError: for a loss that is not finite.
        """
        self.network.train()
        crops, overlap = self.prepare_batch(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.loss(self.network(crops), overlap)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.student.parameters(), self.grad_clip)
        self.optimizer.step()
        self.network.move_teacher()
        if advance:
            self.schedule.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {self.schedule.last_epoch} steps")
        return value

    def recalibrate(self, batches: Sequence[Batch]) -> None:
        """BN statistics from these volumes, so that trained and untrained networks are measured alike; no label is
        used. Leaves the network in evaluation mode."""
        from scripts.health import RecalibrateBN

        engine = SimpleNamespace(
            network=self.network, data_loader=batches, prepare_batch=self.prepare_batch,
            state=SimpleNamespace(device=self.device),
        )  # fmt: skip
        RecalibrateBN()(engine)
        self.network.eval()

    @torch.no_grad()
    def position_accuracy(self, batches: Sequence[Batch]) -> float:
        """Of all random crops of these volumes, after `recalibrate` with the same ones."""
        from scripts.health import PositionAccuracy

        self.recalibrate(batches)
        metric = PositionAccuracy()
        for batch in batches:
            crops, overlap = self.prepare_batch(batch, self.device)
            metric(self.network(crops), overlap)
        return float(metric.aggregate())

    @torch.no_grad()
    def slice_features(self, batch: Batch) -> Tensor:
        """The student's features of each slice, mean over its base crops, [B, S, F]; BN as it stands."""
        only_base = {**batch, "random_crops": batch["random_crops"][:, :0], "overlap": batch["overlap"][:, :0]}
        crops, _ = self.prepare_batch(only_base, self.device)
        return self.network.student.slice_features(crops).mean(dim=1).float().cpu()
