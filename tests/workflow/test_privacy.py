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
from workflow.guard import explain_last
from workflow.privacy import RedactUIDs, anonymous_path, anonymous_text, pseudonym, redact, redacted_logs


@given(st.lists(st.integers(0, 10**9), min_size=5, max_size=9), st.sampled_from("012"))
def test_every_uid_is_replaced_by_its_pseudonym(arcs, first):
    uid = ".".join([first, *map(str, arcs)])
    assert redact(f"/data/{uid}/1.dcm: bad") == f"/data/uid-{pseudonym(uid)}/1.dcm: bad"
    assert redact(f"{uid}.dcm") == f"uid-{pseudonym(uid)}.dcm"


@pytest.mark.parametrize("before", ["", "/", "CT.", "SER_", "CT", "(", "uid="])
def test_whatever_stands_before_it(before):
    for uid in (generate_uid(), generate_uid(prefix=None)):  # the latter is 2.25 and a UUID
        assert redact(f"{before}{uid}.dcm") == f"{before}uid-{pseudonym(uid)}.dcm"


@pytest.mark.parametrize(
    "text", ["torch 2.15.0", "127.0.0.1:8080", "spacing 0.70.5", "3.14159", "1.2.3.4.5", "1.2.25.1234567890"]
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


def test_every_logger_and_handler_is_redacted_for_the_time():
    uid, stream = generate_uid(), io.StringIO()
    late = logging.getLogger("tests.privacy.late")
    late.propagate = False
    with redacted_logs():
        late.addHandler(logging.StreamHandler(stream))
        late.warning("%s: skipped", f"/data/{uid}")
    assert stream.getvalue() == f"/data/uid-{pseudonym(uid)}: skipped\n"
    late.warning(uid)
    assert uid in stream.getvalue()


def test_a_record_that_cannot_be_formatted_does_not_end_the_run(capsys, monkeypatch):
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    with redacted_logs():
        logger.warning("%d files", "many")
    assert "Logging error" in capsys.readouterr().err


def test_the_last_words_of_a_run_hold_no_uid(capsys):
    uid = generate_uid()
    try:
        raise ValueError(f"/data/{uid}: expected one series")
    except ValueError as error:
        explain_last(type(error), error, error.__traceback__)
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert uid not in written
    assert written.endswith(f"error: ValueError: /data/uid-{pseudonym(uid)}: expected one series\n")


def test_paths_become_pseudonyms_of_patient_and_series():
    uid, other = generate_uid(), generate_uid()
    path = f"/data/{uid}/7"
    name = f"{pseudonym(uid)}/{pseudonym('7')}"
    assert anonymous_path(path) == name
    text = f"SeriesError: {path}/{other}.dcm: expected a CT image"
    assert anonymous_text(text, path) == f"SeriesError: {name}/uid-{pseudonym(other)}.dcm: expected a CT image"


def test_a_path_is_hidden_once(tmp_path):
    hidden = anonymous_path(tmp_path / "123" / "456")
    assert hidden == f"{pseudonym('123')}/{pseudonym('456')}"
    assert anonymous_path(hidden) == hidden
