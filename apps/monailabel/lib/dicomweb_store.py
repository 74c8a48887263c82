# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CT series of a DICOMweb server (a PACS).

A series is downloaded when somebody asks for it, as DICOM, to ``series/<SeriesInstanceUID>`` below the cache folder of
that server: whole or not at all, and again when the server has other images of it by now. Labels and notes are below
that folder too, unless they have one of their own, and never go to the server, so keep it. The last list of the series
is ``series.json`` there: what has been downloaded can be reviewed while the server is down.
"""

from __future__ import annotations

import hashlib
import json
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
from workflow.run import write_atomically

from .errors import AppError, Conflict, NotFound
from .files import change_object
from .store import SeriesStore
from .strategies import SCORE

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["DicomwebStore", "Unreachable"]

logger = logging.getLogger(__name__)

CONNECT, ANSWER = 10, 60  # seconds
DOWNLOAD = 1800.0  # seconds that one waits for another's download of the same series
KEEP, RETRY = 300.0, 30.0  # seconds that a list is kept; that the last one is, when the server is down
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
        cache: folder of the caches of all servers; None is that of MONAI Label's settings
            (``MONAI_LABEL_DATASTORE_CACHE_PATH``, or its old name with ``DICOMWEB``), or ``~/.cache/monailabel/dicom``.
        labels: folder below which labels and notes go; None is the cache folder of this server.
    """

    def __init__(self, url: str, table: LabelTable, cache: Path | None = None, *, labels: Path | None = None) -> None:
        self._url = url.strip().rstrip("/")
        if cache is None:
            named = settings.MONAI_LABEL_DATASTORE_CACHE_PATH or settings.MONAI_LABEL_DICOMWEB_CACHE_PATH
            cache = Path(named.strip()) if named.strip() else Path.home() / ".cache" / "monailabel" / "dicom"
        folder = Path(cache).expanduser().absolute() / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        root = folder if labels is None else Path(labels).expanduser().absolute()
        super().__init__(root, folder / "series", table, keep_s=KEEP)
        self._list_file = folder / "series.json"
        self._down: Unreachable | None = None  # why the list is an old one
        self._counts: dict[Path, tuple[int, int]] = {}
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
        """The folder of a series, downloaded if it is not there yet or the server has other images of it by now.

        Raises:
            NotFound: the server has no such series.
            Unreachable: it did not send the whole of it.
            Conflict: it cannot be kept.
        """
        item = self._item(image_id)
        folder = Path(item["image"])
        try:
            if 0 < self._count(folder) == item["instances"]:
                return folder
            self.images_root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.images_root / f".{image_id}.lock", timeout=DOWNLOAD):
                if not (folder.is_dir() and self._is_whole(item, folder)):
                    self._download(item, folder)
        except Timeout as error:
            raise Conflict(f"series {image_id} is being downloaded by another process") from error
        except OSError as error:
            raise Conflict(f"series {image_id} cannot be kept in the cache: {error.strerror}") from error
        return folder

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        raise Conflict("images are not added here: send the series to the DICOMweb server")

    def _count(self, folder: Path) -> int:
        """The number of images that were downloaded of a series; 0 if it was not."""
        try:
            changed = folder.stat().st_mtime_ns
            if self._counts.get(folder, (0, 0))[0] != changed:
                self._counts[folder] = changed, sum(path.suffix == ".dcm" for path in folder.iterdir())
            return self._counts[folder][1]
        except OSError:
            return 0

    def _is_whole(self, item: dict[str, Any], folder: Path) -> bool:
        """Whether the images of a folder are those that the server has now; if it is down they have to do.

        The list may be older than the download, or not say how many there are.
        """
        try:
            with _asking(f"for the images of series {item['id']}"):
                expected = set(self._instances(item["study_id"], item["id"]))
        except Unreachable as error:
            logger.warning("series %s is used as it was downloaded: %s", item["id"], error)
            return True
        if expected != {path.stem for path in folder.glob("*.dcm")}:
            return False
        item["instances"] = len(expected)
        return True

    def _download(self, item: dict[str, Any], folder: Path) -> None:
        study, series = item["study_id"], item["id"]
        part, old = folder.with_name(f".{series}.part"), folder.with_name(f".{series}.old")
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
            shutil.rmtree(old, ignore_errors=True)
            if folder.is_dir():
                logger.info("series %s: the server has other images by now", series)
                folder.rename(old)
                self._forget_score(series)
            part.rename(folder)
            item["instances"] = len(received)
            logger.info("series %s: %d images downloaded", series, len(received))
        finally:
            for each in (part, old):
                shutil.rmtree(each, ignore_errors=True)

    def _instances(self, study: str, series: str) -> Iterator[str]:
        for instance in _pages(lambda offset: self._client.search_for_instances(study, series, offset=offset)):
            yield _text(instance, "SOPInstanceUID")

    def _item(self, image_id: str) -> dict[str, Any]:
        try:
            return super()._item(image_id)
        except NotFound:
            if self._down is not None:  # an old list does not say so
                raise Unreachable(self._down.msg) from None
            raise

    def _find(self) -> dict[str, dict[str, Any]]:
        """The series that the server has, or had when it last answered."""
        try:
            found = self._search()
        except Unreachable as error:
            found = self._found or self._last_list()
            if not found:
                raise
            logger.warning("the last list of the series is used: %s", error)
            self._down, self._keep_s = error, RETRY
            return found
        self._down, self._keep_s = None, KEEP
        if found != self._found:
            self._keep_list(found)
        for uid, item in found.items():
            folder = Path(item["image"])
            differs = item["instances"] is not None and self._count(folder) not in (0, item["instances"])
            if differs and not self._is_whole(item, folder):
                self._forget_score(uid)
        return found

    def _last_list(self) -> dict[str, dict[str, Any]]:
        """That of an earlier process; {} if there is none."""
        try:
            content = json.loads(self._list_file.read_text(encoding="utf-8"))
            known = ("study_id", "patient_id", "instances")
            return {
                uid: self._known(uid, *(item[key] for key in known)) for uid, item in content.items() if _is_uid(uid)
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("the last list of the series cannot be used: %s", error)
            return {}

    def _keep_list(self, found: dict[str, dict[str, Any]]) -> None:
        try:
            write_atomically(self._list_file, json.dumps(found))
        except OSError as error:  # it is missed when the server is down, not now
            logger.warning("the list of the series cannot be kept: %s", error)

    def _forget_score(self, uid: str) -> None:
        """That of a series whose images have changed: the next scoring run downloads and scores it anew."""
        notes = self._notes(uid)

        def forget(content: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in content.items() if key not in (*SCORE, "failed")}

        try:
            if notes.is_file():
                change_object(self._labels, notes, forget, f"notes of image {uid}")
        except Conflict as error:
            logger.warning("%s", error)

    def _known(self, uid: str, study: str, patient: str, instances: int | None) -> dict[str, Any]:
        return {"id": uid, "image": str(self.images_root / uid), "series_id": uid, "study_id": study,
                "patient_id": patient or study, "instances": instances}  # fmt: skip

    def _search(self) -> dict[str, dict[str, Any]]:
        filters = dict(settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER)

        def search(offset: int) -> list[dict[str, Any]]:
            fields = ["PatientID", "NumberOfSeriesRelatedInstances"]
            return self._client.search_for_series(search_filters=filters, fields=fields, offset=offset)

        found = {}
        with _asking("for its series"):
            for series in _pages(search):
                uid, study = _text(series, "SeriesInstanceUID"), _text(series, "StudyInstanceUID")
                if not (_is_uid(uid) and _is_uid(study)):  # it becomes a folder's name
                    logger.warning("series passed over: no proper UID: %.80r of study %.80r", uid, study)
                    continue
                number = _text(series, "NumberOfSeriesRelatedInstances")
                found[uid] = self._known(
                    uid, study, _text(series, "PatientID"), int(number) if number.isdecimal() else None
                )
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
