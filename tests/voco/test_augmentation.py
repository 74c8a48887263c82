# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""`augment_prob` changes the intensities of the student's random crops and nothing else, in 2D and in 3D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

CONFIGS = {
    "2d": (("train.json",), {"crop_size": [16, 16], "num_slices": 4}),
    "3d": (("train.json", "train_3d.json"), {"crop_size": [16, 16, 12]}),
}


def crops(root: Path, dimensions: str, **overrides: Any) -> dict[str, Any]:
    names, small = CONFIGS[dimensions]
    parser = ConfigParser()
    parser.read_config([str(root / "bundles/voco2d_pretrain/configs" / name) for name in names])
    parser.update({**small, **overrides})
    transform = parser.get_parsed_content("train#preprocessing").set_random_state(seed=5)
    volume = torch.randint(0, 256, (1, 48, 48, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return transform({"image": MetaTensor(volume), "series_id": "a"})


@pytest.mark.parametrize("dimensions", CONFIGS)
def test_only_the_random_crops_change(root, dimensions):
    plain, augmented = (crops(root, dimensions, augment_prob=prob) for prob in (0.0, 1.0))
    for key in ("base_crops", "overlap"):
        assert torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(augmented[key]))
    assert augmented["random_crops"].dtype == plain["random_crops"].dtype == torch.uint8
    assert augmented["random_crops"].shape == plain["random_crops"].shape
    assert not torch.equal(plain["random_crops"], augmented["random_crops"])


@pytest.mark.parametrize("dimensions", CONFIGS)
def test_the_default_is_what_the_study_chose(root, dimensions):
    default, chosen = crops(root, dimensions), crops(root, dimensions, augment_prob=0.5)
    assert torch.equal(default["random_crops"], chosen["random_crops"])


@pytest.mark.parametrize("dimensions", CONFIGS)
def test_what_is_left_out_without_it_would_have_done_nothing(root, dimensions):
    """With probability 0 its transforms are not there, for speed; there and never drawn, they give the same crops."""
    without, never = (crops(root, dimensions, augment_prob=prob) for prob in (0.0, 1e-12))
    assert without.keys() == never.keys()
    for key in ("random_crops", "base_crops", "overlap"):
        assert without[key].dtype == never[key].dtype
        assert torch.equal(torch.as_tensor(without[key]), torch.as_tensor(never[key]))
