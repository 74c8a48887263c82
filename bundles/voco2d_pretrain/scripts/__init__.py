# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Code of 2D-VoCo pretraining alone: network, loss, teacher, health figures, embeddings."""
