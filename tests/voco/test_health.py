# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Health figures on embeddings whose state is known: perfect, random, collapsed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler
from torch import Tensor, nn

from bundles.voco2d_pretrain.scripts.batch import PrepareCrops
from bundles.voco2d_pretrain.scripts.health import (
    EmbeddingSpread,
    PositionAccuracy,
    RecalibrateBN,
    SliceHeight,
    embeddings_and_labels,
)
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage

R, K, D = 4, 9, 32


def overlaps(volumes: int, seed: int = 0) -> Tensor:
    labels = torch.rand(volumes, R, K, generator=torch.Generator().manual_seed(seed)) ** 4
    return labels / labels.sum(dim=-1, keepdim=True)


def embeddings(kind: str, labels: Tensor, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    volumes = len(labels)
    base = torch.eye(D)[:K].expand(volumes, K, D)
    if kind == "perfect":  # a random crop is the mixture of what it overlaps
        both = torch.cat([labels @ base, base], dim=1)
    elif kind == "collapsed":
        both = torch.ones(volumes, R + K, D) * 3
    else:
        both = torch.randn(volumes, R + K, D, generator=generator)
    other = torch.randn(volumes, R + K, D, generator=generator) if kind == "random" else both
    return {"student": both, "teacher": other}


def value(metric: PositionAccuracy | EmbeddingSpread, found: dict[str, Tensor], labels: Tensor) -> float:
    """In batches of unequal size, as a loader gives them."""
    metric.reset()
    for part in torch.arange(len(labels)).split(3):
        metric({name: tensor[part] for name, tensor in found.items()}, labels[part])
    return float(metric.aggregate())


def test_position_accuracy_is_one_if_perfect_and_chance_if_random():
    labels = overlaps(400)
    assert value(PositionAccuracy(), embeddings("perfect", labels), labels) == 1.0
    assert value(PositionAccuracy(), embeddings("random", labels), labels) == pytest.approx(1 / K, abs=0.03)
    assert value(PositionAccuracy(), embeddings("collapsed", labels), labels) == pytest.approx(1 / K, abs=0.03)


def test_position_accuracy_is_the_slow_count():
    labels = overlaps(7)
    found = embeddings("random", labels)
    hits = []
    for b in range(7):
        for r in range(R):
            cosines = [
                torch.cosine_similarity(found["student"][b, r], found["teacher"][b, R + k], dim=0) for k in range(K)
            ]
            hits.append(int(np.argmax(cosines)) == int(labels[b, r].argmax()))
    assert value(PositionAccuracy(), found, labels) == pytest.approx(np.mean(hits))
    # scale plays no part, half precision is accepted
    found = {name: tensor.half() * 10 for name, tensor in found.items()}
    assert value(PositionAccuracy(), found, labels) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize(("nearest", "hit"), [(0, 1.0), (3, 1.0), (1, 0.0)])
def test_a_tie_of_overlaps_counts_for_either(nearest, hit):
    labels = torch.tensor([[[0.4, 0.2, 0.0, 0.4]]])
    base = torch.eye(4)
    both = torch.cat([base[nearest][None], base])[None]
    assert value(PositionAccuracy(), {"student": both, "teacher": both}, labels) == hit


def test_the_spread_is_zero_if_collapsed_and_one_if_orthogonal():
    labels = overlaps(5)
    assert value(EmbeddingSpread(), embeddings("collapsed", labels), labels) == pytest.approx(0.0, abs=1e-5)
    assert value(EmbeddingSpread(), embeddings("perfect", labels), labels) == pytest.approx(1.0, abs=1e-6)
    found = embeddings("random", labels)
    slow = [
        1 - torch.cosine_similarity(found["student"][b, R + i], found["student"][b, R + j], dim=0)
        for b in range(5) for i in range(K) for j in range(K) if i != j
    ]  # fmt: skip
    assert value(EmbeddingSpread(), found, labels) == pytest.approx(float(torch.stack(slow).mean()), abs=1e-5)


def height_error(features: Tensor, neighbours: int = 5, batch: int = 2) -> float:
    metric = SliceHeight(neighbours)
    for part in features.split(batch):
        metric({"slices": part}, torch.zeros(len(part), 1, 1))
    return float(metric.aggregate())


def encoded(volumes: int, slices: int) -> Tensor:
    """Features that turn with the height, each volume's a little other."""
    angle = torch.linspace(0, 1.5, slices)
    clean = torch.stack([angle.cos(), angle.sin()], dim=-1).expand(volumes, slices, 2)
    return clean + 0.01 * torch.randn(volumes, slices, 2, generator=torch.Generator().manual_seed(0))


def test_the_height_probe_tells_height_from_noise():
    assert height_error(encoded(10, 24)) < 0.05
    noise = torch.randn(10, 24, 16, generator=torch.Generator().manual_seed(0))
    assert height_error(noise) == pytest.approx(0.27, abs=0.04)  # no better than the constant
    assert height_error(torch.ones(10, 24, 4)) > 0.2
    # the length of a feature plays no part
    assert height_error(encoded(10, 24) * torch.rand(10, 24, 1).add(0.5)) < 0.05


def test_the_height_probe_learns_from_other_volumes_alone():
    # each volume has a direction of its own for all its slices, and heights within it
    features = torch.zeros(4, 12, 8)
    for v in range(4):
        features[v, :, 2 * v] = torch.linspace(0, 1, 12).cos()
        features[v, :, 2 * v + 1] = torch.linspace(0, 1, 12).sin()
    assert height_error(features, neighbours=1) > 0.2  # its own slices would give almost 0


@pytest.mark.parametrize(("volumes", "slices"), [(2, 2), (2, 3), (3, 2), (6, 2)])
def test_the_height_probe_works_with_few_slices(volumes, slices):
    assert height_error(encoded(volumes, slices)) <= 0.55


@pytest.mark.parametrize(("volumes", "slices"), [(1, 24), (5, 1)])
def test_the_height_probe_is_no_number_where_there_is_nothing_to_learn(volumes, slices):
    assert np.isnan(height_error(encoded(volumes, slices)))


class Cnn(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "random_crops": torch.rand(2, 2, 3, 1, 6, 6, generator=generator),
            "base_crops": torch.rand(2, 2, 2, 3, 1, 6, 6, generator=generator) * (1 + i),
            "overlap": torch.rand(2, 2, 4, generator=generator),
        }
        for i in range(3)
    ]


def evaluator(network: nn.Module, handlers: list) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=data(), network=network, prepare_batch=PrepareCrops(),
        decollate=False, val_handlers=handlers,
        key_val_metric={
            "position_accuracy": IgniteMetricHandler(
                metric_fn=PositionAccuracy(), output_transform=embeddings_and_labels, save_details=False
            )
        },
        additional_metrics={
            name: IgniteMetricHandler(metric_fn=metric, output_transform=embeddings_and_labels, save_details=False)
            for name, metric in (("spread", EmbeddingSpread()), ("height", SliceHeight()))
        },
    )  # fmt: skip


def test_the_figures_come_from_an_evaluator():
    torch.manual_seed(0)
    voco = VoCoNetwork(Cnn(), hidden=8, out=8, average=MomentumAverage(0.9))
    engine = evaluator(voco, [])
    engine.run()
    metrics = engine.state.metrics
    assert 0 <= metrics["position_accuracy"] <= 1
    assert 0 < metrics["spread"] < 2
    assert 0 < metrics["height"] < 1
    engine.run()  # again: nothing is left of the first time
    assert engine.state.metrics["height"] == metrics["height"]


def test_recalibration_changes_running_statistics_alone():
    torch.manual_seed(0)
    voco = VoCoNetwork(Cnn(), hidden=8, out=8, average=MomentumAverage(0.9))
    before = {name: tensor.clone() for name, tensor in voco.state_dict().items()}
    momenta = [m.momentum for m in voco.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    engine = evaluator(voco, [RecalibrateBN()])
    engine.run()
    after = voco.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert len(changed) == 3 * len(momenta)
    assert [m.momentum for m in voco.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == momenta
    # the first BN's mean, by hand: over all crops and slices, batch by batch
    convolution = voco.student.backbone.layers[0]
    outputs = [convolution(PrepareCrops()(batch)[0].flatten(0, 2)) for batch in data()]
    expected = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(after["student.backbone.layers.1.running_mean"], expected)
    teacher = after["teacher.module.backbone.layers.1.running_mean"]
    torch.testing.assert_close(teacher, expected)


def test_recalibration_may_be_switched_off():
    voco = VoCoNetwork(Cnn(), hidden=8, out=8, average=MomentumAverage(0.9))
    before = {name: tensor.clone() for name, tensor in voco.state_dict().items()}
    evaluator(voco, [RecalibrateBN(enabled=False)]).run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in voco.state_dict().items())
