# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The images of a server, their labels and what is noted about them.

A label is one JSON file ``labels/<tag>/<image id>.json`` below `SeriesStore.root`; what is known about it is
``labels/.info/<tag>/<image id>.json``, what is noted about the image ``labels/.notes/<image id>.json``. A label that is
replaced or removed is kept as ``labels/.history/<tag>/<image id>.<time>.json``. Files are read at each call and
replaced as a whole, so that several processes work on one store, a restart finds all, and a label that somebody puts
there by hand counts. A path is only ever made of an id that is among the images.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from .errors import AppError, Conflict, NotFound, Unusable
from .files import change_object, read_object, remove_files, write_objects
from .label import check_label

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["LABELS", "SeriesStore"]

logger = logging.getLogger(__name__)

LABELS = "labels"
SHARE = 0.05  # of the time, at most, goes into listing the images again
FINAL = DefaultLabelTag.FINAL.value
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SeriesStore(Datastore):
    """What is the same wherever the images are.

    Args:
        root: folder below which labels and notes are; it is made when there is something to store.
        images_root: folder that image paths are below.
        table: groups and classes of the labels.
        keep_s: seconds that a list of the images is kept, longer where it takes long to make (see `SHARE`); an id that
            is not in it is looked for anew.
    """

    def __init__(self, root: Path, images_root: Path, table: LabelTable, keep_s: float) -> None:
        self.root = root
        self.images_root = images_root
        self.table = table
        self._keep_s = keep_s
        self._found: dict[str, dict[str, Any]] = {}
        self._fresh_until = -float("inf")
        self._finding = threading.Lock()
        self._error: AppError | None = None
        self._error_at = -float("inf")

    @abstractmethod
    def _find(self) -> dict[str, dict[str, Any]]:
        """Id -> {"id", "image", "patient_id", "series_id"} of all images, in a stable order."""

    @abstractmethod
    def path(self, image_id: str) -> Path:
        """The series folder or NIfTI file of an image, on this machine. Raises NotFound."""

    # images
    def items(self, patients: bool = True) -> list[dict[str, Any]]:
        """{"id", "image", "patient_id", "series_id"} of all images; ``image`` is where `path` puts it.

        Args:
            patients: whether ``patient_id`` matters: it may take a look into each image.
        """
        items = [dict(item) for item in self._images().values()]
        return self._with_patients(items) if patients else items

    def list_images(self) -> list[str]:
        return list(self._images())

    def get_image_uri(self, image_id: str) -> str:
        return str(self.path(image_id))

    def get_image(self, image_id: str, params: Any = None) -> io.BytesIO:
        path = self.path(image_id)
        if not path.is_file():
            raise Unusable(f"image {image_id}: is a DICOM series, which is no single file")
        return io.BytesIO(path.read_bytes())

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        item = self._item(image_id)
        try:
            notes = read_object(self._notes(image_id), f"notes of image {image_id}") or {}
        except Unusable as error:  # notes are what the server found out itself: it can do so again
            logger.warning("%s", error)
            notes = {}
        return notes | {key: item[key] for key in ("patient_id", "series_id")}

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Adds to the notes of an image; a value of None removes that note."""
        self._item(image_id)
        self._update(self._notes(image_id), info, f"note of image {image_id}")

    def remove_image(self, image_id: str) -> None:
        self._item(image_id)
        raise Conflict(f"image {image_id} is not removed: this server never deletes images, only labels")

    def refresh(self) -> None:
        self._fresh_until = -float("inf")

    # labels
    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any]) -> str:
        """Stores a label; the one of the tag ``final`` is checked, see `lib.label`.

        Raises:
            NotFound: there is no such image.
            Unusable: the file is no label.
            Conflict: it cannot be written.
        """
        self._item(image_id)
        tag = _check_tag(label_tag)
        what = f"label {tag} of image {image_id}"
        content = read_object(Path(label_filename), what)
        if content is None:
            raise Unusable(f"{what}: expected a JSON file, got none")
        if tag == FINAL:
            content = check_label(content, self.table)
        info = {**(label_info or {}), "ts": int(time.time()), "name": f"{image_id}.json"}
        files, kept = self._files(image_id, tag)
        write_objects(self._labels, list(zip(files, (content, info), kept, strict=True)), what)
        logger.info("stored the %s", what)
        return image_id

    def label(self, image_id: str, tag: str = FINAL) -> dict[str, Any] | None:
        """The content of a label, None if there is none. Raises NotFound, and Unusable for a file that is no label."""
        self._item(image_id)
        tag = _check_tag(tag)
        content = read_object(self._label(image_id, tag), f"label {tag} of image {image_id}")
        if content is None or tag != FINAL:
            return content
        try:
            return check_label(content, self.table)
        except Unusable as error:
            raise Unusable(f"image {image_id}: {error}") from error

    def remove_label(self, label_id: str, label_tag: str) -> None:
        self.get_label_uri(label_id, label_tag)
        tag = _check_tag(label_tag)
        files, kept = self._files(label_id, tag)
        remove_files(self._labels, list(zip(files, kept, strict=True)), f"label {tag} of image {label_id}")

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> io.BytesIO:
        return io.BytesIO(Path(self.get_label_uri(label_id, label_tag)).read_bytes())

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """Path of a label's file. Raises NotFound if there is no such image or label."""
        self._item(label_id)
        tag = _check_tag(label_tag)
        path = self._label(label_id, tag)
        if not path.is_file():
            raise NotFound(f"image {label_id} has no label {tag}")
        return str(path)

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        self._item(image_id)
        return {tag: image_id for tag in self._tags() if self._label(image_id, tag).is_file()}

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        return self.get_labels_by_image_id(image_id).get(_check_tag(tag), "")

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        self.get_label_uri(label_id, label_tag)
        tag = _check_tag(label_tag)
        return read_object(self._label_info(label_id, tag), f"info of label {tag} of image {label_id}") or {}

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        self.get_label_uri(label_id, label_tag)
        tag = _check_tag(label_tag)
        self._update(self._label_info(label_id, tag), info, f"info of label {tag} of image {label_id}")

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the images with a label of this tag (final unless told); `labels` has no meaning here."""
        tag = _check_tag(label_tag)
        return [image_id for image_id in self._images() if self._label(image_id, tag).is_file()]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the images without one, in a stable order."""
        tag = _check_tag(label_tag)
        return [image_id for image_id in self._images() if not self._label(image_id, tag).is_file()]

    def datalist(self) -> list[dict[str, Any]]:
        """{"id", "image", "label", "patient_id", "series_id"} of the images with a final label, ``label`` its file.

        Raises:
            Unusable: a file among the labels is none; the message names them.
        """
        labelled, wrong = [], []
        for image_id in self.get_labeled_images():
            try:
                self.label(image_id)
            except Unusable as error:
                wrong.append(str(error))
            labelled.append({**self._item(image_id), "label": str(self._label(image_id, FINAL))})
        if wrong:
            raise Unusable(f"{len(wrong)} of {len(labelled)} final labels cannot be used: {'; '.join(wrong[:5])}")
        return self._with_patients([{**item, "image": str(self.path(item["id"]))} for item in labelled])

    # the store
    def name(self) -> str:
        return str(self._about().get("name", self.images_root.name))

    def set_name(self, name: str) -> None:
        self._update(self._labels / ".store.json", {"name": str(name)}, "name of the studies")

    def description(self) -> str:
        return str(self._about().get("description", ""))

    def set_description(self, description: str) -> None:
        self._update(self._labels / ".store.json", {"description": str(description)}, "description of the studies")

    def status(self) -> dict[str, Any]:
        images = self._images()
        tags = {tag: sum(self._label(image, tag).is_file() for image in images) for tag in self._tags()}
        tags = {tag: count for tag, count in tags.items() if count}
        return {"total": len(images), "completed": tags.get(FINAL, 0), "label_tags": tags}

    def json(self) -> dict[str, Any]:
        """All images with their notes and the info of their labels, in MONAI Label's layout; no paths."""
        objects = {}
        for image_id in self._images():
            tags = self.get_labels_by_image_id(image_id)
            labels = {tag: {"ext": ".json", "info": self.get_label_info(image_id, tag)} for tag in tags}
            objects[image_id] = {"image": {"ext": "", "info": self.get_image_info(image_id)}, "labels": labels}
        return {"name": self.name(), "description": self.description(), "labels_dir": LABELS, "objects": objects}

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        raise Conflict(f"no archive is made: the images and, below {LABELS}, their labels are files in one folder")

    def _images(self) -> dict[str, dict[str, Any]]:
        asked_at = time.monotonic()
        with self._finding:  # one search at a time: the others wait for what it finds, or for why it does not
            if self._error is not None and self._error_at > asked_at:
                raise type(self._error)(self._error.msg)
            began = time.monotonic()
            if began > self._fresh_until:
                try:
                    self._found = self._find()
                except AppError as error:
                    self._error, self._error_at = error, time.monotonic()
                    raise
                ended = time.monotonic()
                self._fresh_until = ended + max(self._keep_s, (ended - began) / SHARE)
            return self._found

    def _with_patients(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items with the ``patient_id`` to divide them by."""
        return items

    def _item(self, image_id: str) -> dict[str, Any]:
        """What is known of an image. Every method that takes an id calls this first."""
        if not isinstance(image_id, str):
            raise Unusable(f"image: expected an id, got {type(image_id).__name__}")
        item = self._images().get(image_id)
        if item is None:  # it may have come since the last look
            self.refresh()
            item = self._images().get(image_id)
        if item is None:
            raise NotFound(f"there is no image {image_id[:200]!r} among the {len(self._images())} of these studies")
        return item

    def _update(self, path: Path, info: Mapping[str, Any], what: str) -> None:
        if not isinstance(info, Mapping):
            raise Unusable(f"{what}: expected a JSON object, got {type(info).__name__}")

        def merge(content: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in {**content, **info}.items() if value is not None}

        change_object(self._labels, path, merge, what)

    def _about(self) -> dict[str, Any]:
        return read_object(self._labels / ".store.json", "name of the studies") or {}

    @property
    def _labels(self) -> Path:
        return self.root / LABELS

    def _label(self, image_id: str, tag: str) -> Path:
        return self._labels / tag / f"{image_id}.json"

    def _label_info(self, image_id: str, tag: str) -> Path:
        return self._labels / ".info" / tag / f"{image_id}.json"

    def _files(self, image_id: str, tag: str) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
        """The files of a label and of its info, and where (but for the time) those that they replace are."""
        history = self._labels / ".history"
        files = self._label(image_id, tag), self._label_info(image_id, tag)
        return files, (history / tag / image_id, history / ".info" / tag / image_id)

    def _notes(self, image_id: str) -> Path:
        return self._labels / ".notes" / f"{image_id}.json"

    def _tags(self) -> list[str]:
        try:
            return sorted(path.name for path in self._labels.iterdir() if _TAG.fullmatch(path.name) and path.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _check_tag(tag: str | None) -> str:
    """The plain name of a tag, ``final`` for none."""
    if isinstance(tag, Enum):
        tag = str(tag.value)
    if not tag:
        return FINAL
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise Unusable(f"label tag: expected a plain name such as final or original, got {str(tag)[:80]!r}")
    return tag
