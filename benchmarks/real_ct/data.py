# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the real series and the phantoms lie, and what organs they name. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT

# the patients in full (--data), and two of them as the project's small samples (--smoke)
FULL = {
    "crlm_ct_1004": "crlm_ct_1004",
    "cptac_pda_c3l_00189": "cptac_pda_c3l_00189",
    "acrin_flt_breast_001": "acrin_flt_breast_001",
    "lidc_idri_0001": "lidc_idri_0001/cxr.nii.gz",
}
FULL_MASK = "lidc_idri_0001/mask.nii.gz"
SAMPLES = {"crlm_ct_1004": "crlm_ct_1004", "lidc_idri_0001": "lidc_idri_0001.nii.gz"}
SAMPLES_MASK = "lidc_idri_0001_organs.nii.gz"
SAMPLES_FOLDER = ROOT / "tests" / "data"
MASKED = "lidc_idri_0001"  # the patient whose organs are labelled
# label in the mask of the real patient, and in the phantoms' (demo.anatomy)
ORGANS = {"liver": (5, 1), "spleen": (1, 2), "left kidney": (3, 3), "right kidney": (2, 4)}


@dataclass(frozen=True)
class RealData:
    """Path of each patient's series, and of the organ labels of one."""

    series: Mapping[str, Path]
    mask: Path


def find_real(folder: Path | None) -> RealData:
    """The series below `folder`; None takes the project's small samples.

    Raises:
        FileNotFoundError: naming all that is missing.
    """
    root, series, mask = (SAMPLES_FOLDER, SAMPLES, SAMPLES_MASK) if folder is None else (folder, FULL, FULL_MASK)
    missing = [path for path in [*series.values(), mask] if not (root / path).exists()]
    if missing:
        raise FileNotFoundError(
            f"{root}: expected the real series of the benchmark, found no {', '.join(missing)}"
            " (--smoke runs on the project's small samples)"
        )
    return RealData({patient: (root / path).resolve() for patient, path in series.items()}, (root / mask).resolve())
