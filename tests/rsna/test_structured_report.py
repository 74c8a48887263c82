# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM SR of the predictions: read by pydicom and highdicom, and accepted by DCMTK's dsrdump."""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
import warnings
from io import BytesIO
from pathlib import Path

import highdicom as hd
import pydicom
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from pydicom.sr.codedict import codes
from pydicom.uid import ComprehensiveSRStorage
from transforms import SeriesError, __version__

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.predictions import PredictionWriter
from bundles.rsna_cnn_lstm.scripts.structured_report import SCHEME, StructuredReportWriter, make_report, report_file

ROOT = Path(__file__).parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
SOURCE = ROOT / "tests/data/crlm_ct_1004"
ROW = {column: (1 + k) / 100 for k, column in enumerate(TABLE.columns)}
SITES = {"bowel": ["30315005", "14742008"], "extravasation": [], "kidney": ["64033007"], "liver": ["10200004"],
         "spleen": ["78961009"]}  # fmt: skip


@pytest.fixture(scope="module")
def headers() -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(SOURCE.iterdir())]


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sr") / "report.dcm"
    path.write_bytes(report_file(SOURCE, ROW, TABLE))
    return path


def test_header_is_that_of_the_study(report_path, headers):
    report = pydicom.dcmread(report_path)
    assert report.SOPClassUID == ComprehensiveSRStorage
    assert report.Modality == "SR"
    for tag in ("PatientID", "PatientName", "PatientSex", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert report.get(tag) == headers[0].get(tag), tag
    old = {header.SOPInstanceUID for header in headers} | {headers[0].SeriesInstanceUID, headers[0].StudyInstanceUID}
    for uid in (report.SOPInstanceUID, report.SeriesInstanceUID):
        assert uid.is_valid
        assert uid not in old
    assert "research only" in report.SeriesDescription
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert (report.ManufacturerModelName, report.SoftwareVersions) == ("2D-VoCo rsna_cnn_lstm", __version__)


def test_references_are_the_images_of_the_series(report_path, headers):
    expected = {(header.SOPClassUID, header.SOPInstanceUID) for header in headers}
    report = pydicom.dcmread(report_path)
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (
        headers[0].StudyInstanceUID, headers[0].SeriesInstanceUID,
    )  # fmt: skip
    found = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in series.ReferencedSOPSequence]
    assert len(found) == len(expected) == 8
    assert set(found) == expected
    assert "PertinentOtherEvidenceSequence" not in report


def as_tuple(code: hd.sr.CodedConcept) -> tuple[str, str, str]:
    return code.value, code.scheme_designator, code.meaning


def test_every_content_item(report_path, headers):
    report = hd.sr.srread(report_path)
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (observer,) = report.content.get_observer_contexts()
    assert observer.observer_type == codes.DCM.Device
    attributes = observer.observer_identifying_attributes
    assert (attributes.name, attributes.model_name) == ("2D-VoCo rsna_cnn_lstm", f"version {__version__}")
    groups = report.content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == list(TABLE.group_names)
    assert len({group.tracking_uid for group in groups}) == 5
    for group, of_table in zip(groups, TABLE.groups, strict=True):
        assert as_tuple(group.finding_type) == (of_table.name, SCHEME, f"Possible injury: {of_table.name}")
        assert [site.value.value for site in group.finding_sites] == SITES[of_table.name]
        measurements = {found.name.value: found for found in group.get_measurements()}
        assert list(measurements) == list(of_table.columns)
        for column, found in measurements.items():
            assert found.value == ROW[column]
            assert found.unit == codes.UCUM.NoUnits
            assert found.name.scheme_designator == SCHEME
        (use,) = group.get_qualitative_evaluations()
        assert (use.name.value, use.value.meaning) == ("intended_use", "Research only, not for diagnosis")
        images = [image.referenced_sop_instance_uid for image in group.source_images]
        assert set(images) == {header.SOPInstanceUID for header in headers}
        assert len(images) == 8


@pytest.mark.debian
def test_dsrdump_accepts_it(report_path):
    done = subprocess.run(["dsrdump", "+Pc", report_path], capture_output=True, text=True, check=True)
    # its checker of value representations knows no Unicode, and says just that
    assert done.stderr in ("", "W: The VR checker does not support this Specific Character Set: ISO_IR 192\n")
    assert done.stdout.startswith("Comprehensive SR Document")
    for column, value in ROW.items():
        assert f"NUM:({column},{SCHEME}," in done.stdout
        assert f'="{value}" (1,UCUM,"no units")' in done.stdout
    assert done.stdout.count("IMAGE:(121112,DCM") == 5 * 8
    strict = subprocess.run(["dcmftest", report_path], capture_output=True, text=True, check=True)
    assert strict.stdout.startswith("yes: ")


def test_headers_of_anonymised_data_do(headers):
    """Attributes that may be empty are absent; nothing is invented."""
    few = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    images = []
    for header in headers:
        image = pydicom.Dataset()
        for tag in few:
            setattr(image, tag, header.get(tag))
        images.append(image)
    report = make_report(images, ROW, TABLE)
    assert not report.PatientName
    assert not report.PatientID
    assert not report.StudyDate
    assert len(images[0]) == len(few)  # the caller's header is as it was


def test_own_groups_and_names_without_a_caret_make_no_noise(headers):
    table = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json", groups=["liver"])
    header = copy.deepcopy(headers[0])
    header.PatientName = "Nobody"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = make_report([header, *headers[1:]], ROW, table)
    assert report.PatientName == "Nobody"
    assert [
        as_tuple(item.value) for item in hd.sr.utils.find_content_items(report, codes.DCM.Finding, recursive=True)
    ] == [("liver", SCHEME, "Possible injury: liver")]


@pytest.mark.parametrize(("character_set", "name"), [
    (None, "Doe^Jane"),
    ("ISO_IR 100", "Müller^Jürgen"),
    ("ISO-8859-1", "Müller^Jürgen"),  # no DICOM term, but some write it
    ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
])  # fmt: skip
def test_names_in_any_character_set_stay_as_they_are(character_set, name, tmp_path):
    for number, path in enumerate(sorted(SOURCE.iterdir())):
        dataset = pydicom.dcmread(path)
        if number == 0 and character_set is not None:
            dataset.SpecificCharacterSet = character_set
        if number == 0:
            dataset.PatientName = dataset.ReferringPhysicianName = name
            known = {"ISO-8859-1": "latin_1"}.get(str(character_set))
            if known:
                dataset["PatientName"].value = dataset["ReferringPhysicianName"].value = name.encode(known)
        dataset.save_as(tmp_path / path.name)
    report = pydicom.dcmread(BytesIO(report_file(tmp_path, ROW, TABLE)))
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert (str(report.PatientName), str(report.ReferringPhysicianName)) == (name, name)


def test_a_header_without_what_a_report_refers_to_is_named(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "series")
    for path in (tmp_path / "series").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.StudyInstanceUID
        dataset.save_as(path)
    with pytest.raises(SeriesError, match=r"\.dcm: expected StudyInstanceUID for a report to refer to, found none"):
        report_file(tmp_path / "series", ROW, TABLE)


def test_one_of_several_series_of_a_folder(tmp_path, headers):
    for path in SOURCE.iterdir():
        shutil.copy(path, tmp_path / path.name)
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.2.3.4.5.6", pydicom.uid.generate_uid()
        dataset.save_as(tmp_path / f"other_{path.name}")
    with pytest.raises(SeriesError, match="expected one series, found 2"):
        report_file(tmp_path, ROW, TABLE)
    content = report_file(tmp_path, ROW, TABLE, series_uid=headers[0].SeriesInstanceUID)
    study = pydicom.dcmread(BytesIO(content)).CurrentRequestedProcedureEvidenceSequence[0]
    found = {item.ReferencedSOPInstanceUID for item in study.ReferencedSeriesSequence[0].ReferencedSOPSequence}
    assert found == {header.SOPInstanceUID for header in headers}


# --- handler ---


def run(output_dir: Path, items: list[dict]) -> PredictionWriter:
    writer = PredictionWriter(output_dir, TABLE)
    handlers = [writer, StructuredReportWriter(writer)]
    loader = DataLoader(Dataset(items), batch_size=1)
    SupervisedEvaluator(torch.device("cpu"), loader, torch.nn.Identity(), val_handlers=handlers).run()
    return writer


def item(patient: str, source: Path, failed: str = "") -> dict:
    return {"image": torch.linspace(-1, 1, 11), "patient_id": patient, "series_id": "ct", "source": str(source),
            "failed": failed}  # fmt: skip


def test_reports_have_the_numbers_of_the_predictions(tmp_path, data_dir, caplog, headers):
    caplog.set_level(logging.INFO)
    broken = tmp_path / "broken"
    shutil.copytree(SOURCE, broken)
    for path in broken.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.SOPInstanceUID
        dataset.save_as(path, enforce_file_format=False)
    items = [item("d", SOURCE), item("c", tmp_path / "none", "unreadable"), item("b", broken),
             item("a", data_dir / "cptac_pda_c3l_00189.nii.gz")]  # fmt: skip
    writer = run(tmp_path / "out", items)
    assert [path.name for path in (tmp_path / "out" / "sr").iterdir()] == ["000003.dcm"]
    report = hd.sr.srread(tmp_path / "out" / "sr" / "000003.dcm")
    values = {
        m.name.value: m.value for g in report.content.get_image_measurement_groups() for m in g.get_measurements()
    }
    expected = TABLE.probabilities(torch.linspace(-1, 1, 11).double()).tolist()
    assert list(values.values()) == pytest.approx(expected, abs=1e-6)
    assert [source for source, _ in writer.failed] == [str(tmp_path / "none"), str(broken)]
    assert "no DICOM SR: " in writer.failed[1][1]
    assert "expected SOPInstanceUID" in writer.failed[1][1]
    assert "1 series are NIfTI files" in caplog.text
    for secret in (headers[0].SeriesInstanceUID, headers[0].StudyInstanceUID, headers[0].SOPInstanceUID):
        assert secret not in caplog.text
    assert str(headers[0].PatientID) not in caplog.text.replace(str(tmp_path), "")


def test_messages_of_others_are_not_quoted(tmp_path, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise ValueError("Doe^John is no name")

    monkeypatch.setattr("bundles.rsna_cnn_lstm.scripts.structured_report.report_file", refuse)
    assert run(tmp_path, [item("a", SOURCE)]).failed == [(str(SOURCE), "no DICOM SR: ValueError")]


def test_nothing_is_written_where_nothing_was_predicted(tmp_path):
    writer = run(tmp_path, [item("a", SOURCE, "unreadable")])
    assert writer.failed == [(str(SOURCE), "unreadable")]
    assert not list(tmp_path.iterdir())


def test_anonymised_results_have_no_report(tmp_path):
    with pytest.raises(ValueError, match="cannot be written with anonymise"):
        StructuredReportWriter(PredictionWriter(tmp_path, TABLE), anonymise=True)
