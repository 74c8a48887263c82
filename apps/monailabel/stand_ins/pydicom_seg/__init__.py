# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Stands in for pydicom-seg, which MONAI Label imports when it starts and which cannot be imported beside pydicom 3.

It reads and writes DICOM SEG (masks). This app has no masks.
"""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"pydicom_seg.{name}: DICOM SEG is not supported here, pydicom-seg does not work with pydicom 3"
    )
