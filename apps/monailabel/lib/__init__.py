# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of the MONAI Label app. `main.py` puts them together."""
