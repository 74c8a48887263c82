# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which revisions of the code a study's runs were made with. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

UNKNOWN = "unknown"


def revision_note(runs: Mapping[str, int]) -> str:
    """One sentence on the revisions (with the number of runs of each); a warning where figures may not belong together.

    Raises:
        ValueError: without any run.
    """
    if not runs:
        raise ValueError("expected the revisions of the runs, found none")
    told = ", ".join(f"`{revision}` ({number})" for revision, number in sorted(runs.items()))
    faults = []
    if len(runs) > 1:
        faults.append(f"{len(runs)} revisions were mixed")
    if any(revision.endswith("-dirty") for revision in runs):
        faults.append("files differed from the commit")
    if UNKNOWN in runs:
        faults.append("some were made outside git")
    if faults:
        return f"**WARNING: {' and '.join(faults)}; runs by revision: {told}.**"
    return f"All runs by revision: {told}."
