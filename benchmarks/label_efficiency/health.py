# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Is a pretext learning, and what? Figures of its network on the validation volumes."""

from __future__ import annotations

import numpy as np
import torch
from networks.backbone import Backbone
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transforms.voco import RandVoCoCrop, overlap_labels

from bundles.voco2d_pretrain.scripts.health import EmbeddingSpread, PositionAccuracy, SliceHeight
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork

from .data import Patients
from .plan import Plan
from .pretexts import CONTROL
from .training import as_input, equal_slices, slice_features

WINDOW_SEED = 4711  # the same windows for every network
FOLDS = 5
RIDGE = 10.0  # penalty, features being standardised


def _window_crop(plan: Plan) -> RandVoCoCrop:
    settings = plan["pretraining"]
    return RandVoCoCrop(
        grid_size=settings["grid_size"], crop_size=settings["crop_size"], num_random_crops=plan["health"]["windows"]
    ).set_random_state(WINDOW_SEED)


def window_overlaps(plan: Plan) -> np.ndarray:
    """[V, R, K] overlaps of the windows that `position_figures` asks of the validation patients."""
    crop, settings, side = _window_crop(plan), plan["pretraining"], plan["data"]["size"]
    number = plan["data"]["splits"]["validation"]["patients"]
    found = []
    for _ in range(number - (number % settings["batch_size"] == 1)):  # one left over is not asked
        crop.randomize((side, side))
        found.append(overlap_labels(crop.windows, (settings["grid_size"],) * 2, (settings["crop_size"],) * 2).numpy())
    return np.stack(found)


@torch.no_grad()
def position_figures(plan: Plan, network: VoCoNetwork, patients: Patients, form: str) -> dict[str, float]:
    """Position accuracy and embedding spread by the bundle's metrics; BN by batch, for all networks alike.

    The control has no teacher: its student takes both parts.
    """
    settings, health = plan["pretraining"], plan["health"]
    crop = _window_crop(plan)
    slices = equal_slices(patients.depth, health["slices"])
    network.train()
    metrics = {"position_accuracy": PositionAccuracy(), "embedding_spread": EmbeddingSpread()}
    for start in range(0, len(patients.volumes), settings["batch_size"]):
        found = [
            crop(as_input(volume[slices])[:, None])
            for volume in patients.volumes[start : start + settings["batch_size"]]
        ]
        crops = torch.stack(
            [torch.cat([f.random_crops.as_tensor(), f.base_crops.as_tensor().flatten(0, 1)]) for f in found]
        )
        if len(found) < 2:  # BN over one volume would be another measure
            continue
        embeddings = network(crops)
        if form == CONTROL:
            embeddings["teacher"] = embeddings["student"]
        for metric in metrics.values():
            metric(embeddings, torch.stack([f.overlap for f in found]))
    return {name: float(metric.aggregate()) for name, metric in metrics.items()}


def probe_figures(plan: Plan, backbone: Backbone, patients: Patients) -> dict[str, float]:
    """What frozen features of whole slices tell to simple probes, between patients.

    Returns:
        ``organ_auc``: mean over the organs of the AUC of a ridge regression of their presence, cross-validated by
        patient; ``slice_height_error``: the bundle's nearest-neighbour probe, in fractions of the volume.
    """
    slices = equal_slices(patients.depth, plan["fine_tuning"]["num_slices"])
    features = slice_features(backbone, patients.volumes, slices)
    height = SliceHeight()
    height({"slices": features}, torch.empty(0))
    return {
        "organ_auc": organ_auc(features, patients.organs[:, slices]),
        "slice_height_error": float(height.aggregate()),
    }


def organ_auc(features: Tensor, present: np.ndarray) -> float:
    """Mean AUC over the organs that are in some slices and not in others; [V, S, F] and [V, S, O] bool."""
    volumes, number = features.shape[:2]
    truth = present.reshape(volumes * number, -1)
    truth = truth[:, truth.any(axis=0) & ~truth.all(axis=0)]
    groups = np.repeat(np.arange(volumes), number)
    probe = make_pipeline(StandardScaler(), Ridge(RIDGE))
    flat = features.flatten(0, 1).numpy()
    scores = cross_val_predict(probe, flat, truth.astype(float), groups=groups, cv=GroupKFold(min(FOLDS, volumes)))
    return float(np.mean([roc_auc_score(t, s) for t, s in zip(truth.T, scores.reshape(truth.shape).T, strict=True)]))
