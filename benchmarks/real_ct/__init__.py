# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What pretraining on real CT gives on a patient who was left out."""
