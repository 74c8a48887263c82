# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The predictions of a DICOM series as a DICOM structured report (Measurement Report, TID 1500) for the PACS.

It belongs to the patient and the study of the series, whose identity it therefore copies: unlike every other result
file it is as confidential as the images. A measurement group (TID 1501) a group of the label table holds the
probability of each class, the images it came from and the statement that this is research.

Codes: finding sites are SNOMED CT where the group's name is one of `SITES`. The rest has no standard code that means
just this, and stands in the private scheme 99VOCO2D: a group under its name (``liver``: is it injured?), a probability
under its column (``liver_high``, as in ``predictions.csv``), ``intended_use`` and its value ``research``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from ignite.engine import Engine, Events
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from tqdm import tqdm
from transforms import SeriesError, __version__
from transforms.dicom_headers import read_series
from transforms.errors import DAMAGED
from transforms.nifti import is_nifti
from workflow.run import write_atomically

from .labels import LabelGroup, LabelTable
from .predictions import PredictionWriter

__all__ = ["StructuredReportWriter", "make_report"]

logger = logging.getLogger(__name__)

SOFTWARE, SCHEME = "2D-VoCo rsna_cnn_lstm", "99VOCO2D"
SERIES_DESCRIPTION = "2D-VoCo injury probabilities, research only"
SERIES_NUMBER = 9500  # beside the numbers that scanners give
SITES = {
    "bowel": (codes.SCT.SmallIntestine, codes.SCT.LargeIntestine),
    "kidney": (codes.SCT.Kidney,),
    "liver": (codes.SCT.Liver,),
    "spleen": (codes.SCT.Spleen,),
}
REFERENCE_TAGS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
# type 2 in the CT IOD, present though perhaps empty; anonymised data often lack them
OPTIONAL_TAGS = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


class StructuredReportWriter:
    """Handler that writes ``sr/000001.dcm`` for ``series/000001.json`` of a DICOM series, and so on.

    To be attached after the writer of the predictions. A NIfTI file names no patient or study: it gets no report, and
    the log says how many did not. A series whose headers cannot make a report is listed among the writer's failed ones.

    Args:
        writer: the writer of the predictions.
        anonymise: of the run's result files, which a report with the patient's identity would undo.
        series_uid: the one that `LoadSeries` was asked for, where a folder holds several series.

    Raises:
        ValueError: with `anonymise`.
    """

    def __init__(self, writer: PredictionWriter, anonymise: bool = False, series_uid: str | None = None) -> None:
        if anonymise:
            raise ValueError("dicom_sr: a DICOM SR holds the patient's identity and cannot be written with anonymise")
        self.writer, self.series_uid = writer, series_uid

    def attach(self, engine: Engine) -> None:
        """Registers the handler."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _started(self, _engine: Engine) -> None:
        logging.getLogger("highdicom").setLevel(logging.WARNING)  # it logs the UIDs of what it reads
        self._sources: dict[tuple[str, str], str] = {}

    def __call__(self, engine: Engine) -> None:
        """Remembers where the series of the iteration came from (the engine decollates, MONAI's default)."""
        for item in engine.state.batch:
            self._sources[str(item["patient_id"]), str(item["series_id"])] = str(item["source"])

    def _finish(self, _engine: Engine) -> None:
        rows = [] if self.writer.series is None else self.writer.series.to_dict("records")
        written = without = 0
        for number, row in enumerate(tqdm(rows, desc="DICOM SR", leave=False, mininterval=1.0), start=1):
            source = self._sources.get((row["patient_id"], row["series_id"]))
            if source is None:  # of another process of a distributed run, which writes it
                continue
            if is_nifti(Path(source)):
                without += 1
                continue
            try:
                content = report_file(Path(source), row, self.writer.table, self.series_uid)
            except DAMAGED as error:
                # other messages than ours may quote what a header holds
                reason = str(error) if isinstance(error, SeriesError) else type(error).__name__
                self.writer.failed.append((source, f"no DICOM SR: {reason}"))
                continue
            write_atomically(self.writer.output_dir / "sr" / f"{number:06d}.dcm", content)
            written += 1
        logger.info("Wrote DICOM SR of %d series to %s", written, self.writer.output_dir / "sr")
        if without:
            logger.warning("%d series are NIfTI files, which name no patient or study: no DICOM SR of them", without)


def report_file(source: Path, row: Mapping[str, Any], table: LabelTable, series_uid: str | None = None) -> bytes:
    """The report of the DICOM series at `source` as a DICOM file; see `make_report`."""
    paths = [header.path for header in read_series(source, series_uid)[0]]
    images = [pydicom.dcmread(path, stop_before_pixels=True, specific_tags=REFERENCE_TAGS) for path in paths]
    images[0] = pydicom.dcmread(paths[0], stop_before_pixels=True)
    for path, image in zip(paths, images, strict=True):
        absent = [tag for tag in REFERENCE_TAGS if not image.get(tag)]
        if absent:
            raise SeriesError(f"{path}: expected {', '.join(absent)} for a report to refer to, found none.")
    buffer = BytesIO()
    make_report(images, row, table).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def make_report(images: Sequence[Dataset], row: Mapping[str, Any], table: LabelTable) -> ComprehensiveSR:
    """The report of one series.

    Args:
        images: headers of its images, which need `REFERENCE_TAGS`; the first, whose patient and study it takes, whole.
        row: the probability of each of the table's columns.
        table: the groups.
    """
    first = deepcopy(images[0])  # completed below; the caller's stays as it is
    for tag in OPTIONAL_TAGS:
        if tag not in first:
            setattr(first, tag, None)
    # highdicom takes few character sets, and not those of Japanese and Korean scanners: text becomes Unicode
    first.decode()
    first.SpecificCharacterSet = "ISO_IR 192"
    name, first.PatientName = str(first.PatientName or ""), None  # highdicom warns, with the name, without a caret
    first.ReferringPhysicianName = str(first.ReferringPhysicianName or "")
    device = DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[SOFTWARE, __version__]), name=SOFTWARE, model_name=f"version {__version__}"
    )
    content = MeasurementReport(
        ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device)),
        procedure_reported=codes.cid100.CTUnspecifiedBodyRegion,
        imaging_measurements=[_group_content(group, images, row) for group in table.groups],
    )
    report = ComprehensiveSR(
        evidence=[first, *images[1:]],
        content=content[0],
        series_instance_uid=generate_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="The 2D-VoCo bundles authors",
        is_complete=True,
    )
    report.PatientName = name
    report.SeriesDescription = SERIES_DESCRIPTION
    report.ManufacturerModelName, report.SoftwareVersions = SOFTWARE, __version__
    return report


def _group_content(
    group: LabelGroup, images: Sequence[Dataset], row: Mapping[str, Any]
) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: the probabilities of one group."""
    measurements = [
        Measurement(
            name=_private(column, f"Probability of {group.name} {item.name}"),
            value=round(float(row[column]), 6),
            unit=codes.UCUM.NoUnits,
        )
        for column, item in zip(group.columns, group.classes, strict=True)
    ]
    research = QualitativeEvaluation(
        _private("intended_use", "Intended use"), _private("research", "Research only, not for diagnosis")
    )
    return MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(uid=generate_uid(), identifier=group.name),
        finding_type=_private(group.name, f"Possible injury: {group.name}"),
        finding_sites=[FindingSite(site) for site in SITES.get(group.name, ())],
        algorithm_id=AlgorithmIdentification(name=SOFTWARE, version=__version__),
        measurements=measurements,
        qualitative_evaluations=[research],
        source_images=[SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID) for image in images],
    )


def _private(code: str, meaning: str) -> CodedConcept:
    return CodedConcept(value=code, scheme_designator=SCHEME, meaning=meaning)
