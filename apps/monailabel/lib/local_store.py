# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CT series below a folder, found as the bundles find them."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow.datalist import RSNA_IMAGES, DatalistError, find_series

from .errors import Conflict, NotFound, Unusable
from .files import writing
from .patients import HeaderPatients, read_patients
from .store import FINAL, LABELS, SeriesStore

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["LocalStore"]

logger = logging.getLogger(__name__)

TRIES = 5  # a folder that others write to changes while it is listed
UPLOAD = ".upload-"
OWN = (LABELS, f"{LABELS}/*", f"{UPLOAD}*")
NIFTI = (".nii.gz", ".nii")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class LocalStore(SeriesStore):
    """Series of a folder; the id of one is its path below it, as ``case_7/venous`` or ``case_8.nii.gz``.

    Args:
        studies: the folder.
        table: groups and classes of the labels.
        exclude: patterns of paths that are no images, as the bundle's config has them.
        cache_dir: where the index of the folders (see `workflow.index`) and the patients of their headers are kept;
            None lists and reads them all each time.
        labels: folder below which labels and notes go, for studies that cannot be written to; None is the studies.
        patients: CSV of the patient of each image, see `lib.patients`; the others' are those of the header of a DICOM
            series (but for an RSNA tree, whose folders name them), or the path of one without and of a NIfTI file.

    Raises:
        NotFound: there is no such folder.
        SetupError: `patients` is not as it should be.
    """

    def __init__(
        self,
        studies: Path,
        table: LabelTable,
        exclude: Sequence[str] = (),
        cache_dir: Path | None = None,
        *,
        labels: Path | None = None,
        patients: Path | None = None,
    ) -> None:
        studies = Path(studies).expanduser().absolute()
        root = studies if labels is None else Path(labels).expanduser().absolute()
        super().__init__(root, studies, table, keep_s=1.0)
        self._exclude = (*exclude, *OWN, *_inside(self._labels, studies))
        self._cache_dir = cache_dir
        self._named: dict[str, str] = {}
        self._said = ""  # the one patient that all are, if it was said
        if not studies.is_dir():
            raise NotFound(f"studies: expected a folder of CT series, found none at {studies}")
        if root != studies and (studies / LABELS / FINAL).is_dir():
            logger.warning("labels are those below %s: those in %s of the studies are not used", root, LABELS)
        name = f"{hashlib.sha256(str(studies).encode()).hexdigest()[:16]}.json"
        self._headers = HeaderPatients(None if cache_dir is None else Path(cache_dir) / "patients" / name)
        if patients is not None:
            self._named = read_patients(Path(patients).expanduser(), self._images())
            self.refresh()

    def path(self, image_id: str) -> Path:
        path = Path(self._item(image_id)["image"])
        if not path.exists():
            self.refresh()
            raise NotFound(f"image {image_id} is no longer there")
        return path

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        """Copies a NIfTI file into the studies and returns its id: the name with the ending.

        Raises:
            Unusable: it is no NIfTI file by its name, or the id is no plain name or one that is passed over.
            Conflict: there is such an image, or the folder cannot be written to.
        """
        source = Path(image_filename)
        ending = next((end for end in NIFTI if source.name.lower().endswith(end)), None)
        if ending is None:
            raise Unusable("image: expected a NIfTI file, .nii or .nii.gz; put DICOM series into the studies folder")
        name = image_id or source.name
        name = name if name.lower().endswith(ending) else f"{name}{ending}"
        if not _NAME.fullmatch(name) or any(fnmatch.fnmatchcase(name.lower(), item.lower()) for item in self._exclude):
            raise Unusable(
                f"image: expected a name of letters, digits, '_', '-' and '.' that fits none of"
                f" {', '.join(self._exclude)}, got {name[:80]!r}"
            )
        self._copy(source, self.images_root / name)
        self.refresh()
        if image_info:
            self.update_image_info(name, image_info)
        return name

    def _copy(self, source: Path, target: Path) -> None:
        with writing(self._labels, f"image {target.name}", "studies folder"):
            if target.exists():
                raise Conflict(f"there is an image {target.name} already: choose another name")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=UPLOAD) as folder:
                whole = Path(folder, target.name)
                shutil.copyfile(source, whole)
                whole.replace(target)

    def _find(self) -> dict[str, dict[str, Any]]:
        for _ in range(TRIES):
            try:
                return self._list()
            except (FileNotFoundError, NotADirectoryError) as error:
                logger.info("the studies changed while they were listed: %s", error)
            except OSError as error:
                raise Conflict(f"the studies cannot be listed: {error.strerror}") from error
        raise Conflict("the studies cannot be listed: they keep changing, or are gone")

    def _list(self) -> dict[str, dict[str, Any]]:
        if not self.images_root.is_dir():
            raise Conflict("the studies folder is gone")
        try:
            items = find_series(self.images_root, self._exclude, cache_dir=self._cache_dir)
        except DatalistError:  # it is there, so it holds no series yet
            return {}
        found = {}
        for item in items:
            path, root = Path(item["image"]), self.images_root
            image_id = path.relative_to(root).as_posix() if path != root else root.name
            if image_id.isprintable():
                patient = self._named.get(image_id, item["patient_id"])
                found[image_id] = {"id": image_id, "image": item["image"], "patient_id": patient,
                                   "series_id": item["series_id"]}  # fmt: skip
            else:
                logger.warning("passed over, its name cannot be written in a reply: %r", image_id)
        return dict(sorted(found.items()))

    def _with_patients(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = {item["id"]: Path(item["image"]) for item in items if self._is_unnamed(item)}
        found = self._headers.of(path for path in asked.values() if path.is_dir())
        patients = [found[path] for path in asked.values() if found.get(path)]
        if len(patients) > 1 and len(set(patients)) == 1 and self._said != patients[0]:
            self._said = patients[0]
            logger.warning("the headers of all %d DICOM series name the same patient, %r: if they are of several, name"
                           " them by --conf patients", len(patients), patients[0])  # fmt: skip
        return [{**item, "patient_id": found.get(asked.get(item["id"])) or item["patient_id"]} for item in items]

    def _is_unnamed(self, item: Mapping[str, Any]) -> bool:
        """Whether nothing but its path says whose an image is."""
        parts = Path(item["image"]).parts[:-2]
        return item["id"] not in self._named and not any(folder in parts for folder in RSNA_IMAGES)


def _inside(folder: Path, root: Path) -> tuple[str, ...]:
    """Patterns that pass over a folder below the studies, if `OWN` does not."""
    if not folder.is_relative_to(root) or folder.parent == root:
        return ()
    name = glob.escape(folder.relative_to(root).as_posix())
    return name, f"{name}/*"
