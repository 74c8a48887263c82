# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The pretexts: VoCo in its two forms with the bundle's own parts, its variants, and the control without positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.losses import ContrastiveLoss
from monai.transforms import Compose, RandAdjustContrast, RandHistogramShift
from networks.backbone import Backbone
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transforms.slices import ExtractSlices
from transforms.voco import RandVoCoCrop

from bundles.voco2d_pretrain.scripts.batch import PrepareCrops
from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage

from .plan import Plan
from .training import descend, index_batches

CONTROL = "instance_contrast"


def pretext_settings(plan: Plan, pretext: str) -> dict[str, Any]:
    """Those of all pretexts with what this one changes."""
    changed = plan["pretexts"] | plan["variants"]
    return plan["pretraining"] | changed[pretext]


class CropBatches:
    """Batches of crops of a pool as the bundle's training makes them.

    Args:
        volumes: [N, Z, X, Y] uint8.
        settings: of the pretext.
        seed: of order, slices, windows and augmentation.
    """

    def __init__(self, volumes: np.ndarray, settings: Mapping[str, Any], seed: int) -> None:
        self.volumes, self.settings, self.seed = volumes, settings, seed
        self.extract = ExtractSlices(num_slices=settings["num_slices"], mode="jitter").set_random_state(seed)
        self.crop = RandVoCoCrop(
            grid_size=settings["grid_size"],
            crop_size=settings["crop_size"],
            num_random_crops=settings["num_random_crops"],
        ).set_random_state(seed)
        prob = settings["augment_prob"]
        changes = [RandAdjustContrast(prob, gamma=(0.7, 1.4)), RandHistogramShift((4, 8), prob)] if prob else []
        self.augment = Compose(changes)
        self.augment.set_random_state(seed)
        self.prepare = PrepareCrops()

    def item(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random crops, base crops, overlaps and heights (0 lowest slice, 1 highest) of one volume."""
        self.extract.randomize()
        slices = self.extract.slice_indices(self.volumes.shape[1])
        crops = self.crop(torch.from_numpy(self.volumes[index][slices])[:, None])
        random = crops.random_crops.as_tensor()
        if self.settings["augment_prob"]:
            random = torch.as_tensor(self.augment(crops.random_crops)).to(torch.uint8)
        heights = torch.from_numpy(slices / (self.volumes.shape[1] - 1)).float()
        return random, crops.base_crops.as_tensor(), crops.overlap, heights

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Crops [B, R+K, S, 1, h, w], overlaps [B, R, K] and heights [B, S] of each step."""
        order = np.random.default_rng([self.seed, 1])
        steps, size = self.settings["steps"], self.settings["batch_size"]
        for batch in index_batches(len(self.volumes), size, steps, order):
            parts = [torch.stack(part) for part in zip(*(self.item(index) for index in batch), strict=True)]
            names = ("random_crops", "base_crops", "overlap")
            crops, overlap = self.prepare(dict(zip(names, parts[:3], strict=True)))
            yield crops, overlap, parts[3]


class InstanceContrast:
    """The control: SimCLR between crops of a volume, paired at random, against those of the batch's other volumes."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.loss = ContrastiveLoss(temperature)
        self.rng = np.random.default_rng([seed, 2])

    def __call__(self, embeddings: Tensor) -> Tensor:
        """[B, N, D] -> scalar: the mean over the N // 2 pairs of crops."""
        order = self.rng.permutation(embeddings.shape[1])
        pairs = zip(order[0::2], order[1::2], strict=False)  # of an odd number one is left out
        return torch.stack([self.loss(embeddings[:, a], embeddings[:, b]) for a, b in pairs]).mean()


def make_network(plan: Plan, settings: Mapping[str, Any], seed: int) -> VoCoNetwork:
    """Student and teacher; the seed alone decides on the first weights, whatever the pretext."""
    torch.manual_seed(seed)
    backbone, hidden = Backbone(plan["backbone"]), settings["hidden_size"]
    average = MomentumAverage(settings["ema_momentum"], settings["steps"])
    return VoCoNetwork(backbone, hidden, hidden, average=average)


def pretrain(plan: Plan, pretext: str, seed: int, volumes: np.ndarray) -> tuple[VoCoNetwork, list[float]]:
    """The network after its pretext task, and the loss of each step; without steps as it was initialised."""
    settings = pretext_settings(plan, pretext)
    network = make_network(plan, settings, seed)
    height = nn.Linear(network.student.backbone.num_features, 1)  # used by the slice-height term alone
    losses = _losses(network, height, CropBatches(volumes, settings, seed), settings, seed)
    parameters = [*network.student.parameters(), *(height.parameters() if settings["height_weight"] else ())]
    if not settings["steps"]:
        return network, []
    after = (lambda: None) if settings["form"] == CONTROL else network.move_teacher
    return network, descend(parameters, losses, settings["steps"], settings, after)


def _losses(
    network: VoCoNetwork, height: nn.Module, batches: CropBatches, settings: Mapping[str, Any], seed: int
) -> Iterator[Tensor]:
    network.train()
    if settings["form"] == CONTROL:
        contrast = InstanceContrast(settings["temperature"], seed)
        for crops, _, _ in batches:
            yield contrast(network.student(crops))
        return
    voco = VoCoLoss(settings["form"], clamp=settings["clamp"], symmetric_reg=settings["symmetric_reg"])
    for crops, overlap, heights in batches:
        if not settings["height_weight"]:
            yield voco(network(crops), overlap)
            continue
        with torch.no_grad():
            teacher = network.teacher(crops)
        features = network.student.slice_features(crops)  # [B, N, S, F]
        found = voco({"student": network.student.project(features), "teacher": teacher}, overlap)
        guessed = height(features)[..., 0]
        yield found + settings["height_weight"] * mse_loss(guessed, heights[:, None].expand_as(guessed))
