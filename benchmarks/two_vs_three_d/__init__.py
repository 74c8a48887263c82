# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What 2D-VoCo saves over 3D VoCo."""
