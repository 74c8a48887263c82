# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A name for a series that messages may carry: its UID names one examination of one person."""

from __future__ import annotations

import hashlib

__all__ = ["pseudonym"]


def pseudonym(name: str) -> str:
    """12 hexadecimal digits for an identifier: the same for the same text, in every run and on every machine.

    A hash without a secret: it cannot be read, but who has the identifier can make it, which is how a site finds its
    own series again.
    """
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:12]
