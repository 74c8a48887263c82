# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What identifies a patient stays out of logs, and out of result files on request.

DICOM UIDs name one examination of one person to whoever holds the archive. Logs are pasted into issues and mails, so no
UID enters one: `RedactUIDs` puts a pseudonym in its place (`transforms.pseudonym`), the same that result files and
error messages use.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transforms.pseudonym import pseudonym

__all__ = ["RedactUIDs", "anonymous_path", "anonymous_text", "pseudonym", "redact", "redacted_logs"]

# DICOM UIDs (PS3.5, 9.1): digits and dots, first arc 0 to 2; six arcs or more, so that no version, address or decimal
# number is taken for one, or 2.25 and a UUID as an integer (PS3.5, B.2). Letters may stand right before, as in
# CT.1.2.840..., and an arc may begin with a zero, as some devices write it.
_UID = re.compile(r"(?<!\d)(?<!\d\.)(?:[0-2](?:\.\d+){5,}|2\.25\.\d{10,39})(?!\d)")
_HIDDEN = re.compile(r"[0-9a-f]{12}/[0-9a-f]{12}")


def redact(text: str) -> str:
    """The text with ``uid-<pseudonym>`` in place of each DICOM UID."""
    return _UID.sub(lambda match: f"uid-{pseudonym(match[0])}", text)


def anonymous_path(path: str | os.PathLike[str]) -> str:
    """``<pseudonym>/<pseudonym>`` of the last two names, in an RSNA tree those of the patient and of the series.

    One that it gave before (as in a fold's ``failed.csv``) stays.
    """
    if _HIDDEN.fullmatch(os.fspath(path)):
        return os.fspath(path)
    return "/".join(pseudonym(name) for name in Path(path).absolute().parts[-2:])


def anonymous_text(text: str, path: str | os.PathLike[str]) -> str:
    """The text with `anonymous_path` in place of `path`, and without any other UID."""
    return redact(text.replace(os.fspath(path), anonymous_path(path)))


class RedactUIDs(logging.Filter):
    """Filter of a logger or handler that takes DICOM UIDs out of each record, its traceback included."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the arguments do not fit: logging reports that itself
            return True
        record.msg, record.args = redact(message), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


@contextmanager
def redacted_logs() -> Iterator[None]:
    """Within it every record of this process, of whatever logger and for whatever handler, is made without UIDs.

    At the making of the records, since a filter has to be put on each handler, also on those that come later.
    """
    made = logging.getLogRecordFactory()

    def make(*args: object, **kwargs: object) -> logging.LogRecord:
        record = made(*args, **kwargs)
        RedactUIDs().filter(record)
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(made)
