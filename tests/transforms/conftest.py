# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A small CT series on disk, with whatever fault a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.transforms.ct_factory import ct_slice, save


@pytest.fixture
def write_series(tmp_path: Path) -> Callable[..., Path]:
    """Write slices to a folder; `edit(k, ds)` changes a slice first, and leaves it out where it returns False."""

    def write(
        edit: Callable[[int, Dataset], bool | None] | None = None,
        *,
        name: str = "series",
        slices: int = 6,
        step: float = 5.0,
        size: int = 32,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for k in range(slices):
            ds = ct_slice(k, step=step, size=size)
            if edit is None or edit(k, ds) is not False:
                save(ds, folder / f"{k:03d}.dcm")
        return folder

    return write
