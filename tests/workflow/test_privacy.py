# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""No DICOM UID passes the log filter; nothing else is touched."""

from __future__ import annotations

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from workflow.privacy import RedactUIDs, pseudonym, redact


@given(st.lists(st.integers(0, 10**9), min_size=5, max_size=9), st.sampled_from("012"))
def test_every_uid_is_replaced_by_its_pseudonym(arcs, first):
    uid = ".".join([first, *map(str, arcs)])
    assert redact(f"/data/{uid}/1.dcm: bad") == f"/data/uid-{pseudonym(uid)}/1.dcm: bad"
    assert redact(f"{uid}.dcm") == f"uid-{pseudonym(uid)}.dcm"


@pytest.mark.parametrize(
    "text", ["torch 2.15.0", "127.0.0.1:8080", "spacing 0.70.5", "3.14159", "1.2.3.4.5", "a1.2.3.4.5.6"]
)
def test_other_numbers_stay(text):
    assert redact(text) == text


def test_log_records_and_tracebacks_are_redacted():
    uid, stream = generate_uid(), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactUIDs())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError(f"no series {uid}")
    except ValueError:
        logger.exception("while reading %s, %d files", uid, 3)
    assert uid not in stream.getvalue()
    assert f"while reading uid-{pseudonym(uid)}, 3 files" in stream.getvalue()
    assert stream.getvalue().count(f"uid-{pseudonym(uid)}") >= 2
