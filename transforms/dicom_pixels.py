# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How much pixel data a DICOM file holds, without reading it: a file that was cut off is found by its header alone."""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

import pydicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

__all__ = ["missing_pixels"]

# (7FE0,0010) and its byte order
PIXEL_DATA: dict[bytes, Literal["little", "big"]] = {b"\xe0\x7f\x10\x00": "little", b"\x7f\xe0\x00\x10": "big"}
UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
UNDEFINED = 0xFFFFFFFF
FRAGMENT, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def missing_pixels(stream: BinaryIO, dataset: pydicom.Dataset) -> str:
    """What is found instead of a whole image's pixel data, 16 bits a pixel; empty where it is whole.

    Args:
        stream: the file, positioned where its header ends (pydicom stops at the tag of the pixel data).
        dataset: its header, with Rows and Columns.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        return ""  # had to be inflated as a whole for its header, and a cut in it would have been an error
    size = os.fstat(stream.fileno()).st_size
    start = stream.tell()
    head = stream.read(12)
    if head[:4] not in PIXEL_DATA:
        return "none"
    order = PIXEL_DATA[head[:4]]
    explicit = head[4:6] in (b"OB", b"OW", b"UN")  # as the low half of an implicit length these would be odd
    length = int.from_bytes(head[8:12] if explicit else head[4:8], order)
    stream.seek(start + (12 if explicit else 8))
    if length == UNDEFINED:
        return _missing_fragments(stream, size)
    found = min(length, size - stream.tell())
    needed = length
    if syntax in UNCOMPRESSED and isinstance(dataset.get("Rows"), int) and isinstance(dataset.get("Columns"), int):
        needed = 2 * dataset.Rows * dataset.Columns
    return f"{max(found, 0)} of {needed} bytes" if found < needed else ""


def _missing_fragments(stream: BinaryIO, size: int) -> str:
    """The same for compressed data: a sequence of fragments, each with its length. The mark of its end may be absent
    (pydicom decodes such files too), if nothing before it is."""
    fragments = 0
    while True:
        item = stream.read(8)
        if item[:4] == END or len(item) < 8:
            return "" if fragments > 1 else "no fragment"  # the first one is the table of offsets
        if item[:4] != FRAGMENT:
            return "a damaged sequence of fragments"
        if stream.seek(int.from_bytes(item[4:], "little"), os.SEEK_CUR) > size:
            return f"fragment {fragments} cut off"
        fragments += 1
