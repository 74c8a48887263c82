# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Synthetic abdominal trauma CT in the layout of RSNA 2023, and the run of the whole path on it.

Nothing here comes from a patient: every voxel is computed from a seed, and every file says so.
"""
