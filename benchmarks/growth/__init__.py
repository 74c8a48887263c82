# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with slices, series, volumes, batch size and workers."""
