# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What moved a decision: occlusion against a slow version on the image, attention, GradCAM, and the files of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from networks import Backbone
from torch import Tensor, nn
from workflow.dataset import collate_plain

from bundles.rsna_cnn_lstm.scripts.evidence import find_evidence, injury_log_odds
from bundles.rsna_cnn_lstm.scripts.evidence_figure import EvidencePicture, GroupStrip, _upright, draw_evidence
from bundles.rsna_cnn_lstm.scripts.evidence_writer import EvidenceWriter
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from bundles.rsna_cnn_lstm.scripts.predictions import PredictionWriter

ROOT = Path(__file__).parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
POOLS = ("max", "mean", "attention")
PNG = b"\x89PNG\r\n\x1a\n"
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2),
        "always_partition": True, "strict_img_size": False}  # fmt: skip


class Brightness(nn.Module):
    """[N, C, X, Y] -> [N, 1], the mean brightness: a map of 4 x 4 pixels and its mean, linear in the image."""

    num_features = 1

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))

    def feature_map(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.mean(dim=1, keepdim=True), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.feature_map(x))


class NoMemory(nn.Module):
    """Stands for the recurrent network: each slice's state is its own feature."""

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        return features.repeat(1, 1, 2), None


def bright_is_injured(slice_pool: str) -> CNNLSTM:
    """A network for which brightness is injury, in each group."""
    network = CNNLSTM(Brightness(), hidden_size=1, slice_pool=slice_pool, normalise=False)
    network.rnn = NoMemory()
    with torch.no_grad():
        network.head.weight[:] = 10.0
        for place in TABLE.logit_slices.values():
            if place.stop - place.start > 1:
                network.head.weight[place.start] = -10.0  # the healthy class
        network.head.bias.zero_()
        if slice_pool == "attention":
            network.attention.weight[:] = 20.0
    return network


def random_network(backbone: nn.Module, **options: object) -> CNNLSTM:
    torch.manual_seed(1)
    return CNNLSTM(backbone, hidden_size=6, **options)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 15))
def test_log_odds_are_those_of_the_probabilities(seed, scale):
    logits = scale * torch.randn(4, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = TABLE.probabilities(logits)
    for g, part in enumerate(TABLE.column_slices.values()):
        injured = probabilities[:, part][:, 1:].sum(dim=1)
        expected = injured.log() - probabilities[:, part][:, 0].log()
        torch.testing.assert_close(injury_log_odds(TABLE, logits)[:, g], expected, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(slices=st.integers(2, 40), data=st.data(), slice_pool=st.sampled_from(POOLS))
def test_the_slice_that_alone_matters_is_found(slices, data, slice_pool):
    k = data.draw(st.integers(0, slices - 1))
    image = torch.zeros(1, 8, 8, slices)
    image[..., k] = 1.0
    evidence = find_evidence(bright_is_injured(slice_pool), image, TABLE, num_slices=1)
    assert evidence.change.shape == (5, slices)
    assert (evidence.change.argmax(dim=1) == k).all()
    assert (evidence.top == k).all()
    others = evidence.change[:, torch.arange(slices) != k]
    assert (others < 0.5 * evidence.change[:, k, None]).all()
    if slice_pool == "attention":
        assert evidence.attention.argmax() == k
        assert evidence.attention.sum() == pytest.approx(1)
    else:
        assert evidence.attention is None


@pytest.mark.parametrize("slice_pool", POOLS)
@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
@pytest.mark.parametrize("slices", [1, 2, 35])
def test_occlusion_is_that_of_the_image(slice_pool, rnn_type, slices):
    """With features that are linear in the image, the mean of other slices' features is their mean image's."""
    network = random_network(Brightness(), slice_pool=slice_pool, rnn_type=rnn_type).eval()
    image = 3 * torch.rand(1, 8, 8, slices)
    evidence = find_evidence(network, image, TABLE)
    with torch.no_grad():
        whole = injury_log_odds(TABLE, network(image[None]))[0]
        for k in range(slices):  # slow and obvious
            others = [j for j in range(slices) if j != k] or [k]
            occluded = image.clone()
            occluded[..., k] = image[..., others].mean(dim=-1)
            expected = whole - injury_log_odds(TABLE, network(occluded[None]))[0]
            torch.testing.assert_close(evidence.change[:, k], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(evidence.log_odds, whole)
    if slices == 1:
        assert not evidence.change.any()


@settings(deadline=None, max_examples=20)
@given(x=st.integers(0, 3), y=st.integers(0, 3), slice_pool=st.sampled_from(POOLS))
def test_heat_is_where_the_blob_is(x, y, slice_pool):
    image = torch.zeros(1, 32, 40, 5)
    image[:, 8 * x : 8 * x + 8, 10 * y : 10 * y + 10, 3] = 1.0
    evidence = find_evidence(bright_is_injured(slice_pool), image, TABLE, num_slices=2)
    assert evidence.heat.shape == (5, 2, 32, 40)
    assert evidence.heat.amin() >= 0
    assert evidence.heat.amax(dim=(1, 2, 3)) == pytest.approx(1)
    for heat in evidence.heat[:, 0]:
        row, column = divmod(int(heat.argmax()), 40)
        assert (row // 8, column // 10) == (x, y)


@pytest.mark.parametrize("slice_pool", POOLS)
@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("test_efficientnet", {}), ("test_resnet", {"pool": "gem"}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_every_kind_of_network(name, options, slice_pool, rnn_type):
    options = {"backbone_kwargs": options} if "embed_dim" in options else options
    backbone = Backbone(name, in_channels=3, **options)
    network = random_network(backbone, slice_pool=slice_pool, rnn_type=rnn_type).train()
    state = copy.deepcopy(network.state_dict())
    image = torch.rand(3, 64, 64, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as an engine may call it
        evidence = find_evidence(network, image, TABLE, num_slices=9)
    assert evidence.heat.shape == (5, 6, 64, 64)
    assert evidence.top.sort(dim=1).values.tolist() == [list(range(6))] * 5
    assert evidence.change.any()
    assert evidence.heat.any()
    tensors = (evidence.log_odds, evidence.change, evidence.heat)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors)
    # as it was: mode, weights and backbone
    assert network.backbone is backbone
    assert network.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        expected = injury_log_odds(TABLE, network.eval()(image[None]))[0]
    torch.testing.assert_close(evidence.log_odds, expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_of_tokens_has_no_heat_map_and_says_so(caplog):
    backbone = Backbone("test_vit", backbone_kwargs={"img_size": 64})
    evidence = find_evidence(random_network(backbone), torch.rand(1, 64, 64, 4), TABLE)
    assert "tokens instead of a feature map" in caplog.text
    assert evidence.heat.shape == (5, 3, 64, 64)
    assert not evidence.heat.any()
    assert evidence.change.any()


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_every_device_finds_the_same_again(rnn_type, device):
    network = random_network(Backbone("test_efficientnet"), rnn_type=rnn_type)
    image = torch.rand(1, 64, 64, 6)
    expected = find_evidence(network, image, TABLE)
    found = find_evidence(network.to(device), image, TABLE)
    torch.testing.assert_close(found.change, expected.change, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found.heat, expected.heat, rtol=0.05, atol=0.02)


# --- picture ---


def test_slices_are_upright():
    """RAS [X, Y]: x grows to the right of the patient, who faces up and is seen from the feet."""
    image = np.zeros((3, 4))
    image[2, 0] = 1  # right, posterior
    upright = _upright(image)
    assert upright.shape == (4, 3)
    assert upright[3, 0] == 1  # the lowest row, at the left


@pytest.mark.parametrize("slices", [1, 9])
@pytest.mark.parametrize("attention", [False, True])
def test_a_picture_of_any_number_of_slices(slices, attention):
    shown = min(3, slices)
    pixels = np.random.default_rng(0).integers(0, 255, (shown, 12, 10))
    strip = GroupStrip("liver", {"healthy": 0.2, "injury": 0.8}, np.linspace(-1, 1, slices), np.arange(shown), pixels,
                       pixels)  # fmt: skip
    weights = np.full(slices, 1 / slices) if attention else None
    picture = EvidencePicture("Series 1", np.arange(slices) * 5.0, (1.0, 1.5), weights, [strip])
    assert draw_evidence(picture).startswith(PNG)


# --- files of a run ---


def items(count: int = 3) -> list[dict]:
    """Series in an order that is not sorted, of which the second failed."""
    made = []
    for number in range(count):
        affine = torch.eye(4, dtype=torch.float64).repeat(6, 1, 1)
        affine[:, 2, 3] = 100.0 * number + 7.5 * torch.arange(6)
        made.append(
            {
                "image": torch.rand(1, 32, 32, 6, generator=torch.Generator().manual_seed(number)),
                "patient_id": f"secret{9 - number}", "series_id": "ct", "slice_affine": affine,
                "source": f"/data/{number}", "failed": "it is broken" if number == 1 else "",
            }
        )  # fmt: skip
    return made


def evaluator(network: CNNLSTM, data: list[dict], handlers: list) -> SupervisedEvaluator:
    loader = DataLoader(Dataset(data), batch_size=1, collate_fn=collate_plain)
    return SupervisedEvaluator(torch.device("cpu"), loader, network, val_handlers=handlers)


def test_files_of_a_run_have_the_numbers_of_its_predictions(tmp_path, monkeypatch):
    pictures: dict[str, EvidencePicture] = {}  # drawing one takes longer than all the rest

    def draw(picture: EvidencePicture) -> bytes:
        pictures[picture.title[:13]] = picture
        return picture.title.encode()

    monkeypatch.setattr("bundles.rsna_cnn_lstm.scripts.evidence_writer.draw_evidence", draw)
    network, data = random_network(Backbone("test_efficientnet"), slice_pool="attention").eval(), items()
    writer = PredictionWriter(tmp_path, TABLE)
    evaluator(network, data, [writer, EvidenceWriter(network, writer, num_slices=2)]).run()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in names if "evidence" in name} == {
        f"evidence/00000{n}.{kind}" for n in (1, 2) for kind in ("json", "png")
    }
    by_id = {item["patient_id"]: item for item in data}
    for number in (1, 2):
        name = f"00000{number}"
        predicted = json.loads((tmp_path / "series" / f"{name}.json").read_text())
        content = json.loads((tmp_path / "evidence" / f"{name}.json").read_text())
        item = by_id[predicted["patient_id"]]
        expected = find_evidence(network, item["image"], TABLE, 2)
        assert content["series"] == f"series/{name}.json"
        assert content["slice_z_mm"] == item["slice_affine"][:, 2, 3].tolist()
        np.testing.assert_allclose(content["attention"], expected.attention, rtol=1e-5)
        assert list(content["groups"]) == list(TABLE.group_names)
        for g, group in enumerate(content["groups"].values()):
            np.testing.assert_allclose(group["change"], expected.change[g], rtol=1e-3, atol=1e-6)
            assert group["top_slices"] == expected.top[g].tolist()
            injury = 1 - predicted["probabilities"][TABLE.group_names[g]]["healthy"]
            assert group["injury_log_odds"] == pytest.approx(np.log(injury / (1 - injury)), abs=1e-4)
        assert "secret" not in json.dumps(content)
        picture = pictures[f"Series {name}"]
        assert (tmp_path / "evidence" / f"{name}.png").read_text() == picture.title
        assert {strip.name: strip.probabilities for strip in picture.groups} == predicted["probabilities"]
        assert picture.pixel_size == (1, 1)
        for g, strip in enumerate(picture.groups):
            np.testing.assert_array_equal(
                strip.images, item["image"][0].movedim(-1, 0)[expected.top[g]].mul(255).round()
            )
            np.testing.assert_allclose(strip.heat, expected.heat[g] * 255, atol=1.5)


def test_a_run_without_a_readable_series_leaves_nothing(tmp_path):
    network = random_network(Brightness())
    writer = PredictionWriter(tmp_path, TABLE)
    evaluator(network, items()[1:2], [writer, EvidenceWriter(network, writer)]).run()
    assert writer.failed == [("/data/1", "it is broken")]
    assert not list(tmp_path.iterdir())


def test_refuses(tmp_path):
    network, writer = random_network(Brightness()), PredictionWriter(tmp_path, TABLE)
    for wrong in (0, 11, "3", 2.0):
        with pytest.raises(ValueError, match="evidence_slices: expected 1 to 10"):
            EvidenceWriter(network, writer, num_slices=wrong)
    without = [{key: value for key, value in item.items() if key != "slice_affine"} for item in items()]
    run = evaluator(network, without, [writer, EvidenceWriter(network, writer)])
    run.logger.disabled = True
    with pytest.raises(ValueError, match="lacks slice_affine"):
        run.run()
