# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The one error that says a piece of input data cannot be used, and why."""

from __future__ import annotations

import struct
import zlib

from pydicom.errors import BytesLengthException, InvalidDicomError

__all__ = ["DAMAGED", "SeriesError"]

# What pydicom, nibabel and the decoders under them raise on damaged files.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    BytesLengthException,
    InvalidDicomError,
    struct.error,
    zlib.error,
)


class SeriesError(ValueError):
    """Input data cannot become a volume; the message names the folder or file, what was expected and what was found.

    A batch over many series catches this one type, lists the message as the reason and goes on. Messages never hold a
    patient's name, identifier or dates beyond what the path given by the caller holds.
    """
