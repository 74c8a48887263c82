# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What every public transform must do as a transform, whatever it is for: MetaTensor, seeds, the way to workers."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
import transforms
from monai.data import MetaTensor
from monai.transforms import Randomizable, Transform

ARGUMENTS: dict[str, dict[str, Any]] = {
    "CropBody": {},
    "CropBodyd": {"keys": "image"},
    "CropSeriesd": {"keys": "image"},
    "ExtractSlices": {"num_slices": 4, "mode": "jitter"},
    "ExtractSlicesd": {"keys": "image", "num_slices": 4, "mode": "jitter"},
    "LoadOrganMask": {"labels": 1},
    "LoadSeries": {},
    "LoadSeriesd": {"keys": "image"},
    "RandVoCoCrop": {"crop_size": 8},
    "RandVoCoCropd": {"keys": "image", "crop_size": 8},
    "SliceAffinesd": {"keys": "image"},
    "SliceLabels": {"groups": ["liver"]},
    "SliceLabelsd": {"groups": ["liver"]},
}
RANDOM = sorted(name for name in ARGUMENTS if issubclass(getattr(transforms, name), Randomizable))
OF_AN_IMAGE = ("CropBody", "ExtractSlices", "RandVoCoCrop")
AFFINE = torch.diag(torch.tensor([0.8, 0.8, 5.0, 1.0], dtype=torch.float64))


def made(name: str) -> Any:
    return getattr(transforms, name)(**ARGUMENTS[name])


def volume() -> MetaTensor:
    """Air around a body of random tissue, [1, 24, 24, 16] in HU."""
    image = torch.full((1, 24, 24, 16), -1000.0)
    image[:, 2:22, 2:22] = torch.randn(1, 20, 20, 16, generator=torch.Generator().manual_seed(0)) * 10 + 50
    return MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": "x"})


def called(transform: Any, name: str) -> Any:
    image = volume().permute(3, 0, 1, 2) if "VoCo" in name else volume()  # a crop of slices, or a volume
    return transform({"image": image} if name.endswith("d") else image)


def tensors(result: Any) -> list[torch.Tensor]:
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else [result]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_none_is_forgotten() -> None:
    public = {name for name in transforms.__all__ if inspect.isclass(getattr(transforms, name))}
    assert {name for name in public if issubclass(getattr(transforms, name), Transform)} == set(ARGUMENTS)
    assert len(RANDOM) == 4


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_a_worker_gets_it_whole(name: str) -> None:
    transform = made(name)
    copy = pickle.loads(pickle.dumps(transform))
    assert type(copy) is type(transform)
    assert {key for key in vars(copy) if key != "R"} == {key for key in vars(transform) if key != "R"}
    assert inspect.getdoc(type(transform))


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_decides_all_of_it(name: str) -> None:
    first, again, other = (tensors(called(made(name).set_random_state(seed), name)) for seed in (1, 1, 2))
    torch.manual_seed(9)  # no other generator plays a part
    copy = tensors(called(pickle.loads(pickle.dumps(made(name).set_random_state(1))), name))
    assert first
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, copy, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", OF_AN_IMAGE)
def test_what_a_metatensor_knows_is_kept(name: str) -> None:
    results = [t for t in tensors(called(made(name), name)) if isinstance(t, MetaTensor)]
    assert results
    assert all(result.meta["filename_or_obj"] == "x" for result in results)
    assert all(torch.equal(result.affine[:2, :2], AFFINE[:2, :2]) for result in results)
