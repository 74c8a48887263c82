# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Generators that are seeded in place draw what new ones draw; meta data put on quickly are MONAI's."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Randomizable
from transforms.meta import with_meta
from transforms.seeding import SeededInPlace


@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_every_seed_gives_the_numbers_of_a_new_generator(seeds):
    transform = SeededInPlace()
    for seed in seeds:
        drawn = transform.set_random_state(seed=seed).R.random_sample(3)
        assert drawn.tolist() == Randomizable().set_random_state(seed=seed).R.random_sample(3).tolist()
        transform.R.standard_normal()  # leaves a second number behind in the generator


def test_the_generator_is_the_one_it_made():
    transform = SeededInPlace().set_random_state(seed=1)
    made = transform.R
    assert transform.set_random_state(seed=2).R is made
    copy = pickle.loads(pickle.dumps(transform))
    assert copy.set_random_state(seed=1).R.randint(1000) == transform.set_random_state(seed=1).R.randint(1000)
    assert copy.R is not made


def test_generators_of_others_are_left_alone():
    given_state = np.random.RandomState(5)
    expected = np.random.RandomState(5).random_sample(4).tolist()
    transform = SeededInPlace().set_random_state(seed=1).set_random_state(state=given_state)
    assert transform.R is given_state
    transform.set_random_state(seed=2)
    assert transform.R is not given_state
    assert given_state.random_sample(4).tolist() == expected
    of_all = Randomizable.R.get_state()[1].copy()
    SeededInPlace().set_random_state(seed=3)
    assert np.array_equal(Randomizable.R.get_state()[1], of_all)
    transform.set_random_state(seed=3)
    arbitrary = transform.set_random_state().R
    assert transform.set_random_state(seed=3).R is not arbitrary


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 3, 4), (2, 1, 2, 3, 2, 1)])
@pytest.mark.parametrize("affine", ["float64", "float32", "array", "2D", "absent"])
def test_meta_data_put_on_quickly_are_monais(affine, shape):
    plain = torch.arange(24.0).view(shape)
    meta = {"filename_or_obj": "a.nii", "windows": torch.ones(2, 2)}
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    kinds = {"float64": matrix, "float32": matrix.float(), "array": matrix.numpy(), "2D": matrix[1:, 1:]}
    if affine != "absent":
        meta["affine"] = kinds[affine]
    before = dict(meta)
    found, expected = with_meta(plain, meta, [{"class": "Flip"}]), MetaTensor(plain, meta=dict(meta))
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.as_tensor(), plain)
    assert found.as_tensor().data_ptr() == plain.data_ptr()
    assert torch.equal(found.affine, expected.affine)
    assert found.affine.dtype == expected.affine.dtype
    assert found.meta.keys() == expected.meta.keys()
    assert found.meta["space"] == expected.meta["space"]
    assert found.spatial_ndim == expected.spatial_ndim
    assert vars(found).keys() == vars(expected).keys()
    assert found.applied_operations == [{"class": "Flip"}]
    assert found.pending_operations == expected.pending_operations == []
    found.meta["mine"] = 1
    assert meta.keys() == before.keys()
