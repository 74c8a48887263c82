# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The error at the bottom of a chain."""

from __future__ import annotations

import pytest

from workflow.errors import root_cause


def _wrapped(depth: int) -> None:
    try:
        if depth:
            _wrapped(depth - 1)
        else:
            raise KeyError("liver")
    except (KeyError, RuntimeError) as error:
        raise RuntimeError(f"layer {depth}") from error


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_the_cause_of_all_layers_is_named(depth):
    with pytest.raises(RuntimeError) as caught:
        _wrapped(depth)
    assert root_cause(caught.value) == "KeyError: 'liver'"


def test_an_error_without_cause_is_its_own():
    assert root_cause(ValueError("x is 3")) == "ValueError: x is 3"
