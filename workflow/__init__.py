# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the runs of both bundles share: datalists and folds, cache, checkpoints, checked weight loading, the override
guard and the run folder. Never a transform, never a network."""

from __future__ import annotations

__version__ = "0.3.0"
