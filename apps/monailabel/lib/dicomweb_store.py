# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CT series of a DICOMweb server (a PACS).

A series is downloaded when somebody asks for it, as DICOM, to ``series/<SeriesInstanceUID>`` below the cache folder of
that server: whole or not at all. Labels and notes are below that folder too and never go to the server, so keep it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from filelock import FileLock, Timeout
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from .errors import AppError, Conflict
from .store import SeriesStore

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["DicomwebStore", "Unreachable"]

logger = logging.getLogger(__name__)

CONNECT, ANSWER = 10, 60  # seconds
DOWNLOAD = 1800.0  # seconds that one waits for another's download of the same series
AS_STORED = (("application/dicom", "*"),)  # not transcoded by the server
_UID = re.compile(r"[0-9.]{1,64}")


class Unreachable(AppError):
    """The DICOMweb server does not answer, or not as it should."""

    status = 502


class DicomwebStore(SeriesStore):
    """Series of a DICOMweb server; the id of one is its SeriesInstanceUID.

    MONAI Label's settings hold: user and password, prefixes and the search filter (by default modality CT).

    Args:
        url: of the DICOMweb service, as ``http://127.0.0.1:8042/dicom-web``.
        table: groups and classes of the labels.
        cache: folder of the caches of all servers; None is that of MONAI Label's settings, or
            ``~/.cache/monailabel/dicom``.
    """

    def __init__(self, url: str, table: LabelTable, cache: Path | None = None) -> None:
        self._url = url.strip().rstrip("/")
        if cache is None:
            named = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip()
            cache = Path(named) if named else Path.home() / ".cache" / "monailabel" / "dicom"
        root = Path(cache).expanduser().absolute() / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        super().__init__(root, root / "series", table, keep_s=10.0)
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        self._client = DICOMwebClientX(
            url=self._url,
            session=create_session_from_user_pass(user, password) if user and password else None,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
            timeout=(CONNECT, ANSWER),
        )
        self._client.set_http_retry_params(retry=False)  # who asked is waiting: an error now, not in half a minute

    def name(self) -> str:
        return str(self._about().get("name", urlsplit(self._url).hostname))

    def path(self, image_id: str) -> Path:
        """The folder of a series, downloaded if it is not there yet.

        Raises:
            NotFound: the server has no such series.
            Unreachable: it did not send the whole of it.
            Conflict: it cannot be kept.
        """
        item = self._item(image_id)
        folder = Path(item["image"])
        if folder.is_dir():
            return folder
        try:
            self.images_root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.images_root / f".{image_id}.lock", timeout=DOWNLOAD):
                if not folder.is_dir():
                    self._download(item["study_id"], image_id, folder)
        except Timeout as error:
            raise Conflict(f"series {image_id} is being downloaded by another process") from error
        except OSError as error:
            raise Conflict(f"series {image_id} cannot be kept in the cache: {error.strerror}") from error
        return folder

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        raise Conflict("images are not added here: send the series to the DICOMweb server")

    def _download(self, study: str, series: str, folder: Path) -> None:
        part = folder.with_name(f".{series}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            with _asking(f"for series {series}"):
                expected = set(self._instances(study, series))
                received = {_save(instance, series, part) for instance in self._client.iter_series(
                    study, series, media_types=AS_STORED)}  # fmt: skip
            if received != expected or not expected:
                raise Unreachable(
                    f"the DICOMweb server sent {len(received & expected)} of the {len(expected)} images of series"
                    f" {series}, and {len(received - expected)} others: ask again"
                )
            part.rename(folder)
            logger.info("series %s: %d images downloaded", series, len(received))
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _instances(self, study: str, series: str) -> Iterator[str]:
        for instance in _pages(lambda offset: self._client.search_for_instances(study, series, offset=offset)):
            yield _text(instance, "SOPInstanceUID")

    def _find(self) -> dict[str, dict[str, Any]]:
        filters = dict(settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER)

        def search(offset: int) -> list[dict[str, Any]]:
            return self._client.search_for_series(search_filters=filters, fields=["PatientID"], offset=offset)

        found = {}
        with _asking("for its series"):
            for series in _pages(search):
                uid, study = _text(series, "SeriesInstanceUID"), _text(series, "StudyInstanceUID")
                if not (_is_uid(uid) and _is_uid(study)):  # it becomes a folder's name
                    logger.warning("series passed over: no proper UID: %.80r of study %.80r", uid, study)
                    continue
                found[uid] = {"id": uid, "image": str(self.images_root / uid), "series_id": uid, "study_id": study,
                              "patient_id": _text(series, "PatientID") or study}  # fmt: skip
        return dict(sorted(found.items()))


def _pages(ask: Callable[[int], list[dict[str, Any]]]) -> Iterator[Dataset]:
    """All answers of a search. A server may give some at a time; one that ignores the offset repeats itself."""
    seen: set[str] = set()
    while True:
        answers = [Dataset.from_json(answer) for answer in ask(len(seen))]
        new = [answer for answer in answers if _key(answer) not in seen]
        if not new:
            return
        seen.update(_key(answer) for answer in new)
        yield from new


def _key(answer: Dataset) -> str:
    return _text(answer, "SOPInstanceUID") or _text(answer, "SeriesInstanceUID")


def _text(answer: Dataset, keyword: str) -> str:
    value = answer.get(keyword)
    return "" if value is None else str(value).strip()


def _is_uid(text: str) -> bool:
    return bool(_UID.fullmatch(text)) and text.strip(".") == text


def _save(instance: Dataset, series: str, folder: Path) -> str:
    """Writes an image of the series and returns its UID."""
    uid = _text(instance, "SOPInstanceUID")
    if not _is_uid(uid) or _text(instance, "SeriesInstanceUID") != series:
        raise ValueError(f"it sent image {uid[:80]!r} of another series")
    instance.save_as(folder / f"{uid}.dcm")
    return uid


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """What goes wrong between us and the server is `Unreachable`."""
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code
        raise Unreachable(f"the DICOMweb server was asked {what} and refused: HTTP {status}") from error
    except requests.Timeout as error:
        raise Unreachable(f"the DICOMweb server was asked {what} and did not answer in time") from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise Unreachable(f"the DICOMweb server was asked {what} and cannot be reached, or broke off") from error
    except (requests.RequestException, InvalidDicomError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unreachable(f"the DICOMweb server was asked {what} and sent what is no DICOM: {error}") from error
