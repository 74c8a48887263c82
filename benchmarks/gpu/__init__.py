# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed on a GPU: precision, memory format, compilation, where crops are cut, and what the loader costs."""
