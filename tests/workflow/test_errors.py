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


def test_an_error_that_explains_its_cause_is_not_gone_behind():
    error = RuntimeError("applying transform")
    error.__cause__ = ValueError("folds.csv: has no column fold")
    error.__cause__.__cause__ = KeyError("fold")
    assert root_cause(error) == "ValueError: folds.csv: has no column fold"
