# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The CT series below a folder, found as the bundles find them."""

from __future__ import annotations

import fnmatch
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow.datalist import DatalistError, find_series

from .errors import Conflict, NotFound, Unusable
from .files import writing
from .store import LABELS, SeriesStore

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["LocalStore"]

logger = logging.getLogger(__name__)

TRIES = 5  # a folder that others write to changes while it is listed
OWN = (LABELS, f"{LABELS}/*")
NIFTI = (".nii.gz", ".nii")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class LocalStore(SeriesStore):
    """Series of a folder; the id of one is its path below it, as ``case_7/venous`` or ``case_8.nii.gz``.

    Args:
        studies: the folder; labels and notes go below it too.
        table: groups and classes of the labels.
        exclude: patterns of paths that are no images, as the bundle's config has them.
        cache_dir: where the index of the folders is kept (see `workflow.index`); None lists them all each time.

    Raises:
        NotFound: there is no such folder.
    """

    def __init__(
        self, studies: Path, table: LabelTable, exclude: Sequence[str] = (), cache_dir: Path | None = None
    ) -> None:
        studies = Path(studies).expanduser().absolute()
        super().__init__(studies, studies, table, keep_s=1.0)
        self._exclude = (*exclude, *OWN)
        self._cache_dir = cache_dir
        if not studies.is_dir():
            raise NotFound(f"studies: expected a folder of CT series, found none at {studies}")

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
        self._copy(source, self.root / name)
        self.refresh()
        if image_info:
            self.update_image_info(name, image_info)
        return name

    def _copy(self, source: Path, target: Path) -> None:
        with writing(self._labels, f"image {target.name}"):
            if target.exists():
                raise Conflict(f"there is an image {target.name} already: choose another name")
            with tempfile.TemporaryDirectory(dir=self._labels, prefix=".upload-") as folder:
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
        if not self.root.is_dir():
            raise Conflict("the studies folder is gone")
        try:
            items = find_series(self.root, self._exclude, cache_dir=self._cache_dir)
        except DatalistError:  # it is there, so it holds no series yet
            return {}
        found = {}
        for item in items:
            path = Path(item["image"])
            image_id = path.relative_to(self.root).as_posix() if path != self.root else self.root.name
            if image_id.isprintable():
                found[image_id] = {"id": image_id, **{key: item[key] for key in ("image", "patient_id", "series_id")}}
            else:
                logger.warning("passed over, its name cannot be written in a reply: %r", image_id)
        return dict(sorted(found.items()))
