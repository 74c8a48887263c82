# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the method is the same, the baselines' numbers are ours: what the speed benchmark compares is the same work."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose
from networks.backbone import Backbone
from transforms.slices import ExtractSlices
from transforms.voco import RandVoCoCrop, overlap_labels

from benchmarks import monai_caches, reference
from bundles.rsna_cnn_lstm.scripts.network import CNNLSTM
from bundles.voco2d_pretrain.scripts.loss import VoCoLoss
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import MomentumAverage

GRID, CROP = (3, 3), (16, 16)
NAME, HIDDEN = "test_efficientnet", 16


def windows_inside(number: int = 20) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 33, size=(number, 2))


def test_overlap_labels_are_equal() -> None:
    windows = windows_inside()
    torch.testing.assert_close(
        reference.overlap_by_loops(windows.tolist(), GRID, CROP), overlap_labels(windows, GRID, CROP), rtol=0, atol=0
    )


def test_slices_are_equal() -> None:
    volume = torch.rand(1, 5, 4, 64)
    ours = ExtractSlices(num_slices=32)(volume).as_tensor()
    assert torch.equal(reference.EqualSlices(32)({"image": volume})["image"], ours)


def test_crops_are_equal_to_the_bit() -> None:
    slab = torch.randint(0, 256, (4, 1, 48, 48), dtype=torch.uint8)
    ours = RandVoCoCrop(grid_size=GRID, crop_size=CROP)
    found = ours(slab)
    chain = reference.Crops(GRID, CROP)
    chain.windows = ours.windows.tolist()
    expected = chain({"image": slab.permute(1, 2, 3, 0).contiguous()}, randomize=False)
    assert expected["crops"].shape == (11, 4, 1, 16, 16)
    assert torch.equal(found.random_crops.as_tensor().float(), expected["crops"][:2])
    assert torch.equal(found.base_crops.as_tensor().flatten(0, 1).float(), expected["crops"][2:])
    assert torch.equal(found.overlap, expected["overlap"])


def test_the_baselines_draw_windows_at_both_ends() -> None:
    chain, cached = reference.Crops(GRID, CROP, 200), monai_caches.RandCrops(4, GRID, CROP, 200)
    chain({"image": torch.zeros(1, 48, 48, 4)})
    cached({"image": torch.zeros(4, 1, 48, 48, dtype=torch.uint8)})
    for found in (np.array(chain.windows), cached.windows):
        assert (found.min(), found.max()) == (0, 32)


def example(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings [B, 11, 8] of student and teacher, correlated so that cosines of both signs come up, and labels."""
    base = torch.randn(batch, 11, 8, dtype=torch.float64)
    student = (base + 0.5 * torch.randn_like(base)).requires_grad_()
    labels = torch.stack([overlap_labels(windows_inside(2), GRID, CROP)] * batch).double()
    return student, base, labels


@pytest.mark.parametrize("batch", [2, 4])
def test_loss_and_gradient_are_equal(batch: int) -> None:
    student, teacher, labels = example(batch)
    ours = VoCoLoss(clamp="hard", symmetric_reg=False)({"student": student, "teacher": teacher}, labels)
    expected = reference.voco_loss(student, teacher, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, expected)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_loss_is_the_golden_one(root, name: str) -> None:
    with np.load(root / "tests" / "golden" / f"voco_loss_{name}.npz") as file:
        golden = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    found = reference.voco_loss(golden["student"], golden["teacher"], golden["labels"])
    torch.testing.assert_close(found, golden["intra"] + golden["inter"] + golden["reg"], rtol=1e-5, atol=1e-6)


def test_only_the_original_differentiates_the_teacher() -> None:
    crops, labels = torch.rand(2, 11, 2, 1, 32, 32), example(2)[2].float()
    for wanted in (True, False):
        network = reference.VoCo(NAME, HIDDEN, teacher_gradient=wanted)
        network(crops, labels).backward()
        assert all(parameter.grad is not None for parameter in network.student.parameters())
        assert (next(network.teacher.parameters()).grad is not None) is wanted


def pair(channels_last: bool = True) -> tuple[VoCoNetwork, reference.VoCo]:
    """Our network and the original's structure with the same weights, the teacher's other than the student's."""
    original = reference.VoCo(NAME, HIDDEN)
    with torch.no_grad():
        for parameter in original.teacher.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    backbone = Backbone(NAME, channels_last=channels_last)
    ours = VoCoNetwork(backbone, HIDDEN, HIDDEN, average=MomentumAverage(reference.MOMENTUM))
    for own, other in ((ours.student, original.student), (ours.teacher.module, original.teacher)):
        own.backbone.model.load_state_dict(other.backbone.state_dict())
        own.projector.load_state_dict(other.projector.state_dict())
    return ours, original


def test_the_moving_average_is_equal() -> None:
    ours, original = pair()
    ours.move_teacher()
    original.move_teacher()
    ours_now = dict(ours.teacher.module.projector.named_parameters())
    ours_now |= dict(ours.teacher.module.backbone.model.named_parameters())
    expected = dict(original.teacher.projector.named_parameters()) | dict(original.teacher.backbone.named_parameters())
    assert ours_now.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours_now[name], value, rtol=1e-6, atol=1e-7)


def test_embeddings_are_equal() -> None:
    ours, original = pair()
    ours.train()
    crops = torch.rand(2, 11, 2, 1, 32, 32)
    embeddings = ours(crops)
    torch.testing.assert_close(embeddings["student"], original.student(crops), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(embeddings["teacher"], original.teacher(crops), rtol=1e-3, atol=1e-4)


def test_the_classifier_is_the_same_in_both_memory_formats() -> None:
    networks = [CNNLSTM(Backbone(NAME, channels_last=last), dropout=0.0).train() for last in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    image = torch.rand(2, 1, 32, 32, 4)
    logits = [network(image) for network in networks]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    gradients = [
        torch.autograd.grad(out.square().sum(), net.head.weight)[0] for out, net in zip(logits, networks, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


@pytest.fixture
def nifti(tmp_path) -> str:
    """A body of 20 HU in air, stored left-posterior."""
    hu = np.full((40, 36, 20), -1000, dtype=np.int16)
    hu[6:30, 8:32, 2:18] = 20
    hu += np.random.RandomState(0).randint(-5, 5, hu.shape).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-1.0, -1.0, 2.0, 1.0])), tmp_path / "volume.nii.gz")
    return str(tmp_path / "volume.nii.gz")


def test_the_chain_is_the_method(nifti: str) -> None:
    """Window, RAS, crop to the foreground, resize: step by step with nothing but numpy before the resize."""
    volume = reference.preparation((24, 24, 16))({"image": nifti})["image"]
    hu = np.asarray(nib.as_closest_canonical(nib.load(nifti)).dataobj).astype(np.float32)
    windowed = np.clip((hu + 175) / 425, 0, 1)
    inside = np.argwhere(windowed > 0.3)
    start, end = inside.min(axis=0), inside.max(axis=0) + 1
    box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
    assert windowed[box].shape == (24, 24, 16)  # so that resizing changes nothing
    np.testing.assert_allclose(volume[0].numpy(), windowed[box], atol=1e-6)


def test_both_caches_give_crops_of_the_prepared_volume(nifti: str, tmp_path) -> None:
    """Crops of the slices drawn are pieces of the volume that the deterministic chain gives, as our cache holds it."""
    size, crops = (48, 48, 16), monai_caches.RandCrops(4, GRID, CROP)
    volume = reference.preparation(size)({"image": nifti})["image"].as_tensor()
    slab = (volume * 255).round().to(torch.uint8).permute(3, 0, 1, 2)
    on_disk = monai_caches.on_disk([nifti], tmp_path / "cache", size, crops)
    in_memory = monai_caches.in_memory([nifti], size, crops)
    for dataset in (on_disk, in_memory):
        assert isinstance(dataset.transform, Compose)
        for _ in range(2):  # made, then read
            found, used = dataset[0], dataset.transform.transforms[-1]
            expected = RandVoCoCrop(grid_size=GRID, crop_size=CROP)
            expected.windows = used.windows
            same = expected(slab[torch.from_numpy(used.index)], randomize=False)
            assert torch.equal(found["crops"][:2], same.random_crops.as_tensor() / 255)
            assert torch.equal(found["crops"][2:], same.base_crops.as_tensor().flatten(0, 1) / 255)
            assert torch.equal(found["overlap"], same.overlap)
            assert (np.diff(used.index) > 0).all()
    (file,) = (tmp_path / "cache").glob("*.pt")
    for cached in (torch.load(file), in_memory._cache[0]):  # no float, no slices to gather from memory at each step
        assert torch.equal(cached["image"], slab)
        assert type(cached["image"]) is torch.Tensor
        assert cached["image"].is_contiguous()
