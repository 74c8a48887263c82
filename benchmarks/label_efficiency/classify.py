# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of the bundle's CNN-LSTM classifier on some of the labelled patients, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from networks.backbone import Backbone
from torch import Tensor, nn
from transforms.slices import ExtractSlices

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.loss import InjuryLoss
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM

from .plan import Plan
from .training import as_input, descend, equal_slices, index_batches, slice_features

EVALUATED_AT_ONCE = 10  # volumes


class CachedFeatures(nn.Module):
    """Stands for a frozen backbone whose features were computed before: [N, F, 1, 1] -> [N, F]."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        return x.flatten(1)


def labelled_subset(labelled: int, rate: int, seed: int) -> np.ndarray:
    """Indices of the patients whose labels are used at a rate in %; a lower rate's are among a higher rate's."""
    order = np.random.default_rng([seed, 3]).permutation(labelled)
    return order[: max(round(labelled * rate / 100), 1)]


def frozen_features(backbone: Backbone, volumes: np.ndarray) -> np.ndarray:
    """[N, Z, X, Y] uint8 -> [N, Z, F] float32, of every slice."""
    return slice_features(backbone, volumes, np.arange(volumes.shape[1])).numpy()


def as_batch(images: np.ndarray) -> Tensor:
    """Volumes [B, S, X, Y] uint8 or features [B, S, F] -> what the classifier takes, [B, C, H, W, S]."""
    if images.ndim == 3:
        return torch.from_numpy(images).permute(0, 2, 1)[:, :, None, None]
    return as_input(images).permute(0, 2, 3, 1)[:, None]


def make_classifier(
    plan: Plan, table: LabelTable, mode: str, seed: int, weights: Mapping[str, Tensor] | None
) -> CNNLSTM:
    """The classifier; the seed alone decides on its head, whatever the pretraining.

    Args:
        weights: of the backbone; None for cached features.
    """
    settings = plan["fine_tuning"]
    torch.manual_seed(seed)
    backbone = Backbone(plan["backbone"])
    options = {"hidden_size": settings["hidden_size"], "dropout": settings["dropout"]}
    if weights is None:
        return CNNLSTM(CachedFeatures(backbone.num_features), table.num_logits, **options)
    backbone.load_state_dict(weights)
    return CNNLSTM(backbone, table.num_logits, **options, freeze=plan["freeze"][mode])


def fine_tune(
    plan: Plan, table: LabelTable, network: CNNLSTM, images: np.ndarray, classes: np.ndarray, seed: int, steps: int
) -> list[float]:
    """Train on images [N, Z, X, Y] (or features [N, Z, F]) with classes [N, G]; the loss of each step."""
    settings, loss = plan["fine_tuning"], InjuryLoss(table)
    extract = ExtractSlices(num_slices=settings["num_slices"], mode="jitter").set_random_state(seed)
    rng, flips = np.random.default_rng([seed, 4]), np.random.default_rng([seed, 5])
    torch.manual_seed(seed)  # dropout
    network.train()

    def item(index: int) -> np.ndarray:
        extract.randomize()
        image = images[index][extract.slice_indices(images.shape[1])]
        axes = tuple(np.flatnonzero(flips.random(2) < settings["flip_prob"]) + 1) if image.ndim == 3 else ()
        return np.flip(image, axes)

    def losses() -> Iterator[Tensor]:
        for batch in index_batches(len(images), settings["batch_size"], steps, rng):
            inputs = as_batch(np.stack([item(index) for index in batch]))
            yield loss(network(inputs), torch.from_numpy(classes[batch]))

    return descend([p for p in network.parameters() if p.requires_grad], losses(), steps, settings)


@torch.no_grad()
def predict(plan: Plan, table: LabelTable, network: CNNLSTM, images: np.ndarray) -> np.ndarray:
    """[N, P] float32 probabilities, no flips."""
    network.eval()
    slices = equal_slices(images.shape[1], plan["fine_tuning"]["num_slices"])
    parts = [
        network(as_batch(images[start : start + EVALUATED_AT_ONCE, slices]))
        for start in range(0, len(images), EVALUATED_AT_ONCE)
    ]
    return table.probabilities(torch.cat(parts)).numpy()


def settings_of(plan: Plan, rate: int) -> dict[str, Any]:
    """What a run's record says of its fine-tuning."""
    return {key: value for key, value in plan["fine_tuning"].items() if key != "steps"} | {
        "steps": plan["fine_tuning"]["steps"][str(rate)]
    }
