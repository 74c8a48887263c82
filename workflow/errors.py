# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What went wrong, without the layers that it went through; and the error of datalists."""

from __future__ import annotations

__all__ = ["DatalistError", "NonFiniteError", "root_cause"]


class DatalistError(ValueError):
    """The data folder, datalist or fold file is not what it should be; the message names it."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is no number; a rescued one says already where the state before that step is."""

    rescued = False


def root_cause(error: BaseException) -> str:
    """The error under MONAI's wrapping: it raises a RuntimeError from each error of a transform or a config
    expression."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
