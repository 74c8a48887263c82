# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What identifies a patient stays out of logs, and out of result files on request.

DICOM UIDs name one examination of one person to whoever holds the archive. Logs are pasted into issues and mails, so no
UID enters one: `RedactUIDs` puts a pseudonym in its place, the same that result files and error messages use. The
pseudonym is a hash without a secret: it cannot be read, but who has the UID can make it, which is how a site finds its
own series again.
"""

from __future__ import annotations

import hashlib
import logging
import re

__all__ = ["RedactUIDs", "pseudonym", "redact"]

# roots of DICOM UIDs (PS3.5, 9.1): digits and dots, first arc 0 to 2; six arcs or more, so that no version, address or
# decimal number is taken for one
_UID = re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){5,}(?!\d)")


def pseudonym(name: str) -> str:
    """12 hexadecimal digits for an identifier: the same for the same text, in every run and on every machine."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:12]


def redact(text: str) -> str:
    """The text with ``uid-<pseudonym>`` in place of each DICOM UID."""
    return _UID.sub(lambda match: f"uid-{pseudonym(match[0])}", text)


class RedactUIDs(logging.Filter):
    """Filter of a log handler that takes DICOM UIDs out of each record, its traceback included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True
