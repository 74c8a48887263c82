# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed beside the original's chain and step, and beside MONAI's caches: `python -m benchmarks.speed`."""
