# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Labels and notes as small files: ids that lead nowhere else, changes that no process loses, faults that are named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom import dcmread

from apps.monailabel.lib import patients as patients_of
from apps.monailabel.lib.bundles import SetupError
from apps.monailabel.lib.errors import Conflict, NotFound, Unusable
from apps.monailabel.lib.label import check_label
from apps.monailabel.lib.local_store import LocalStore
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "rsna_cnn_lstm"
TABLE = LabelTable.from_file(BUNDLE / "configs" / "labels.json")
EXCLUDE = json.loads((BUNDLE / "configs" / "inference.json").read_text())["exclude"]
LABEL = {"groups": {"bowel": "healthy", "liver": "high"}, "comment": "segment 7"}
# paths that must never be read or written, as ids and as tags
OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "a.nii.gz/../../secret",
    "..",
    ".",
    "",
    "labels/final/a.nii.gz",
    "a.nii.gz\0",
    "~",
]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two files and a DICOM series; what is in them does not matter to the store."""
    folder = tmp_path / "studies"
    shutil.copytree(ROOT / "tests" / "data" / "crlm_ct_1004", folder / "case 7" / "venous")
    for name in ("b.nii.gz", "a.nii.gz"):
        (folder / name).write_bytes(b"a volume")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    return folder


def open_store(studies: Path) -> LocalStore:
    return LocalStore(studies, TABLE, EXCLUDE)


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def save(store: LocalStore, image: str, tmp_path: Path, content: object = LABEL, tag: str = "final") -> str:
    return store.save_label(image, write(tmp_path / "sent.json", content), tag, {"user": "A. B."})


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_are_those_that_the_bundle_finds(studies: Path) -> None:
    for name in ("a_mask.nii.gz", "label_3.nii.gz", "labels/final/x.nii.gz", "labels/.upload-1/y.nii.gz"):
        (studies / name).parent.mkdir(parents=True, exist_ok=True)
        (studies / name).write_bytes(b"no image")
    store = open_store(studies)
    assert store.list_images() == ["a.nii.gz", "b.nii.gz", "case 7/venous"]
    assert store.path("case 7/venous") == studies / "case 7" / "venous"
    item = {"id": "b.nii.gz", "image": str(studies / "b.nii.gz"), "patient_id": "b.nii.gz", "series_id": "b.nii.gz"}
    assert store.items()[1] == item
    assert store.status() == {"total": 3, "completed": 0, "label_tags": {}}


def test_patients_of_an_rsna_tree(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "crlm_ct_1004", tmp_path / "train_images" / "10004" / "21057")
    item = open_store(tmp_path).items()[0]
    assert (item["id"], item["patient_id"], item["series_id"]) == ("train_images/10004/21057", "10004", "21057")


def test_a_folder_without_series_is_empty_and_takes_what_comes(studies: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    store = open_store(tmp_path / "new")
    assert store.list_images() == []
    assert store.get_unlabeled_images() == []
    shutil.copy(studies / "a.nii.gz", tmp_path / "new")
    assert store.path("a.nii.gz").is_file(), "an unknown id is looked for anew"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"expected a folder of CT series, found none at .*nowhere"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize("image", [*OUTSIDE, "c.nii.gz"])
def test_only_ids_of_images_are_taken(studies: Path, tmp_path: Path, image: str) -> None:
    store = open_store(studies)
    sent = write(tmp_path / "sent.json", LABEL)
    before = files_below(tmp_path)
    calls = [
        lambda: store.get_image_uri(image),
        lambda: store.get_image(image),
        lambda: store.get_image_info(image),
        lambda: store.update_image_info(image, {"a": 1}),
        lambda: store.remove_image(image),
        lambda: store.save_label(image, sent, "final", {}),
        lambda: store.label(image),
        lambda: store.remove_label(image, "final"),
        lambda: store.get_label(image, "final"),
        lambda: store.get_label_uri(image, "final"),
        lambda: store.get_labels_by_image_id(image),
        lambda: store.get_label_by_image_id(image, "final"),
        lambda: store.get_label_info(image, "final"),
        lambda: store.update_label_info(image, "final", {"a": 1}),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="there is no image"):
            call()
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("tag", [tag for tag in OUTSIDE if tag] + [".notes", ".info", "a/b", "final\n", 7])
def test_only_plain_names_are_tags(studies: Path, tmp_path: Path, tag: str) -> None:
    store = open_store(studies)
    sent = write(tmp_path / "sent.json", LABEL)
    before = files_below(tmp_path)
    for call in (
        lambda: store.save_label("a.nii.gz", sent, tag, {}),
        lambda: store.get_label_uri("a.nii.gz", tag),
        lambda: store.remove_label("a.nii.gz", tag),
        lambda: store.update_label_info("a.nii.gz", tag, {}),
        lambda: store.get_unlabeled_images(tag),
    ):
        with pytest.raises(Unusable, match="label tag: expected a plain name"):
            call()
    assert files_below(tmp_path) == before


def test_an_image_that_goes_away_is_not_found(studies: Path) -> None:
    store = open_store(studies)
    assert "a.nii.gz" in store.list_images()
    (studies / "a.nii.gz").unlink()
    with pytest.raises(NotFound, match=r"a\.nii\.gz is no longer there"):
        store.path("a.nii.gz")


def test_a_label_is_kept_as_it_was_checked(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    sent = {"groups": {"liver": "high", "bowel": "healthy"}, "comment": "segment 7"}
    assert save(store, "case 7/venous", tmp_path, sent) == "case 7/venous"
    file = studies / "labels" / "final" / "case 7" / "venous.json"
    assert store.get_label_uri("case 7/venous", DefaultLabelTag.FINAL) == str(file)
    assert json.loads(file.read_text()) == LABEL == json.load(store.get_label("case 7/venous", "final"))
    assert list(json.loads(file.read_text())["groups"]) == ["bowel", "liver"]
    assert store.get_labels_by_image_id("case 7/venous") == {"final": "case 7/venous"}
    assert store.get_label_by_image_id("case 7/venous", "original") == ""
    assert store.get_label_info("case 7/venous", "final")["user"] == "A. B."
    assert store.get_labeled_images() == ["case 7/venous"]
    assert store.get_unlabeled_images() == ["a.nii.gz", "b.nii.gz"]
    assert store.status() == {"total": 3, "completed": 1, "label_tags": {"final": 1}}
    assert store.datalist() == [{"id": "case 7/venous", "image": str(studies / "case 7/venous"), "label": str(file),
                                 "patient_id": "CRLM-CT-1004", "series_id": "case 7/venous"}]  # fmt: skip


def test_the_reply_of_an_inference_is_no_final_label(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    reply = {"prediction": [{"idx": 0, "label": "bowel_healthy", "score": 0.25}], "any_injury": 0.5}
    save(store, "a.nii.gz", tmp_path, reply, tag="original")
    assert store.label("a.nii.gz", "original") == reply
    assert store.get_labeled_images() == []
    assert store.get_labeled_images("original") == ["a.nii.gz"]
    with pytest.raises(Unusable, match="expected groups, comment and reader, found 'prediction'"):
        save(store, "a.nii.gz", tmp_path, reply)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ([1], "expected a JSON object, got list"),
        ('{"groups": {"liver": NaN}}', "NaN is no JSON number"),
        ({"groups": {}}, "at least one of bowel, extravasation, kidney, liver, spleen"),
        ({"groups": ["liver"]}, "at least one of bowel"),
        ({"liver": "high"}, "found 'liver'"),
        ({"groups": {"heart": "healthy"}}, "expected bowel, extravasation, kidney, liver, spleen, found 'heart'"),
        ({"groups": {"bowel": "low"}}, "bowel: expected healthy or injury, found 'low'"),
        ({"groups": {"liver": 1}}, "liver: expected healthy or low or high, found 1"),
        ({"groups": {"liver": ["low"]}}, "liver: expected healthy or low or high"),
        (" " * 4_000_001, "expected at most 4000000 bytes"),
        ({"groups": {"liver": "low"}, "comment": 3}, "comment: expected a text"),
        ({"groups": {"liver": "low"}, "reader": "x" * 10_001}, "reader: expected a text of at most 10000"),
    ],
)
def test_what_is_wrong_with_a_label_is_named(studies: Path, tmp_path: Path, content: object, message: str) -> None:
    store = open_store(studies)
    with pytest.raises(Unusable, match=message):
        save(store, "a.nii.gz", tmp_path, content)
    assert store.get_labeled_images() == []


def test_every_class_of_the_table_is_a_label() -> None:
    for group in TABLE.groups:
        for item in group.classes:
            label = {"groups": {group.name: item.name}}
            assert check_label(label, TABLE) == label


def test_a_restart_keeps_labels_and_notes(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    save(store, "a.nii.gz", tmp_path)
    store.update_image_info("b.nii.gz", {"entropy": 0.5})
    store.set_name("ward 3")
    again = open_store(studies)
    assert again.label("a.nii.gz") == LABEL
    assert again.get_image_info("b.nii.gz")["entropy"] == 0.5
    assert (again.name(), again.description()) == ("ward 3", "")
    assert again.json() == store.json()
    assert str(studies) not in json.dumps(again.json())


def test_a_label_put_there_by_hand_counts(studies: Path) -> None:
    store = open_store(studies)
    assert store.get_labeled_images() == []
    (studies / "labels" / "final").mkdir(parents=True)
    write(studies / "labels" / "final" / "b.nii.gz.json", LABEL)
    write(studies / "labels" / "final" / "of_no_image.json", LABEL)
    assert store.get_labeled_images() == ["b.nii.gz"]
    assert store.label("b.nii.gz") == LABEL
    assert store.get_label_info("b.nii.gz", "final") == {}
    write(studies / "labels" / "final" / "a.nii.gz.json", {"groups": {"liver": "bad"}})
    with pytest.raises(Unusable, match=r"1 of 2 final labels cannot be used: image a\.nii\.gz: label: liver"):
        store.datalist()


def test_a_label_can_be_taken_back(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    save(store, "a.nii.gz", tmp_path)
    store.remove_label("a.nii.gz", "final")
    assert store.get_unlabeled_images() == store.list_images()
    assert [name for name in files_below(studies / "labels") if "lock" not in name and ".history" not in name] == []
    with pytest.raises(NotFound, match=r"image a\.nii\.gz has no label final"):
        store.remove_label("a.nii.gz", "final")


def test_no_label_is_ever_lost(studies: Path, tmp_path: Path) -> None:
    store, image = open_store(studies), "case 7/venous"
    history = studies / "labels" / ".history"
    labels = [{"groups": {"liver": name}} for name in ("healthy", "low", "high")]
    save(store, image, tmp_path, labels[0])
    assert not history.exists(), "nothing was replaced"
    for content in (labels[0], labels[1], labels[2]):
        save(store, image, tmp_path, content)
    store.remove_label(image, "final")
    save(store, image, tmp_path, labels[0])
    kept = sorted((history / "final" / "case 7").iterdir())
    assert all(re.fullmatch(r"venous\.\d{8}T\d{6}\.\d{6}Z\.json", path.name) for path in kept)
    assert [json.loads(path.read_text()) for path in kept] == labels, "in the order of their end, the same one once"
    infos = sorted((history / ".info" / "final" / "case 7").iterdir())
    assert [path.name for path in infos] == [path.name for path in kept]
    assert {json.loads(path.read_text())["user"] for path in infos} == {"A. B."}
    assert store.list_images() == ["a.nii.gz", "b.nii.gz", "case 7/venous"]
    assert store.status()["label_tags"] == {"final": 1}


def test_what_somebody_put_there_by_hand_is_kept_as_it_was(studies: Path, tmp_path: Path) -> None:
    file = studies / "labels" / "final" / "a.nii.gz.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff no label")
    save(open_store(studies), "a.nii.gz", tmp_path)
    [kept] = (studies / "labels" / ".history" / "final").iterdir()
    assert kept.read_bytes() == b"\xff no label"


def test_notes_are_merged_and_none_removes_one(studies: Path) -> None:
    store = open_store(studies)
    store.update_image_info("a.nii.gz", {"entropy": 0.5, "failed": "x"})
    store.update_image_info("a.nii.gz", {"strategy": {"random": {"ts": 1}}, "failed": None})
    notes = {"entropy": 0.5, "strategy": {"random": {"ts": 1}}}
    assert store.get_image_info("a.nii.gz") == {**notes, "patient_id": "a.nii.gz", "series_id": "a.nii.gz"}
    for wrong in ([1], {"a": float("nan")}, {"a": float("inf")}, {"a": object()}):
        with pytest.raises(Unusable, match="expected a JSON object"):
            store.update_image_info("a.nii.gz", wrong)
    (studies / "labels" / ".notes" / "a.nii.gz.json").write_text("{ broken")
    assert store.get_image_info("a.nii.gz") == {"patient_id": "a.nii.gz", "series_id": "a.nii.gz"}


NOTE = """
import sys, time
from pathlib import Path
from apps.monailabel.lib.local_store import LocalStore
store, name, signals = LocalStore(Path(sys.argv[1]), None), sys.argv[2], Path(sys.argv[3])
signals.joinpath(name).touch()
while not signals.joinpath("go").exists():
    time.sleep(0.001)
for number in range(100):
    store.update_image_info("a.nii.gz", {f"{name}{number}": "x" * number})
    store.refresh()
    assert store.list_images(), "the list is whole while files come and go"
"""


def test_notes_of_two_processes_at_once_are_all_kept(studies: Path, tmp_path: Path) -> None:
    signals = tmp_path / "signals"
    signals.mkdir()
    names = ("left", "right")
    processes = [subprocess.Popen([sys.executable, "-c", NOTE, str(studies), name, str(signals)], cwd=ROOT,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)}) for name in names]  # fmt: skip
    while not all((signals / name).exists() for name in names):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (signals / "go").touch()
    store = open_store(studies)
    while any(process.poll() is None for process in processes):
        time.sleep(0.01)
        notes = store.get_image_info("a.nii.gz")  # never half of a file
        assert all(value == "x" * len(value) for value in map(str, notes.values()) if value.startswith("x"))
    assert [process.wait(120) for process in processes] == [0, 0]
    notes = store.get_image_info("a.nii.gz")
    expected = {f"{name}{number}": "x" * number for name in names for number in range(100)}
    assert {key: notes.get(key) for key in expected} == expected
    assert [name for name in files_below(studies / "labels") if "tmp" in name] == []


def test_notes_of_threads_at_once_are_all_kept(studies: Path) -> None:
    store = open_store(studies)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: store.update_image_info("a.nii.gz", {str(number): number}), range(60)))
    assert set(map(str, range(60))) < set(store.get_image_info("a.nii.gz"))


def test_those_who_wait_for_a_search_that_fails_do_not_repeat_it(
    studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(studies)
    tried: list[float] = []
    together = threading.Barrier(8)

    def fail() -> None:
        tried.append(time.monotonic())
        time.sleep(1)
        raise Conflict("it hangs")

    def ask() -> list[str]:
        together.wait(30)
        return store.list_images()

    monkeypatch.setattr(store, "_find", fail)
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(ask) for _ in range(8)]
        assert {str(each.exception()) for each in found} == {"it hangs"}
    assert len(tried) == 1
    monkeypatch.undo()
    assert len(store.list_images()) == 3, "the next one tries again"


def test_an_index_of_the_folders_does_not_hide_what_is_new(studies: Path, tmp_path: Path) -> None:
    store = LocalStore(studies, TABLE, EXCLUDE, tmp_path / "cache")
    for name in ("c.nii.gz", "d.nii.gz", "case 7/e.nii.gz"):
        assert len(store.list_images()) == len(set(store.list_images()))
        shutil.copy(studies / "a.nii.gz", studies / name)
        assert store.path(name) == studies / name
    assert list((tmp_path / "cache").rglob("*.json"))


READ_ONLY = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from apps.monailabel.lib.errors import Conflict
from apps.monailabel.lib.local_store import LocalStore
store = LocalStore(Path(sys.argv[1]), None)
assert store.list_images() and store.path("a.nii.gz") and store.status()["total"] == 3
for call in (lambda: store.save_label("a.nii.gz", sys.argv[2], "original", {}),
             lambda: store.update_image_info("a.nii.gz", {"a": 1}), lambda: store.add_image("n", sys.argv[3], {})):
    try:
        call()
    except Conflict as error:
        sys.stdout.write(str(error) + "\\n")
"""


def test_studies_that_cannot_be_written_to_are_read_and_the_error_says_so(studies: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.nii.gz"
    new.write_bytes(b"a volume")
    studies.chmod(0o555)
    try:
        out = as_a_user(READ_ONLY, str(studies), write(tmp_path / "sent.json", LABEL), str(new)).splitlines()
    finally:
        studies.chmod(0o755)
    said = [line.partition("the server may not write to the ")[2] for line in out]
    assert said == ["labels folder", "labels folder", "studies folder"], out
    assert not (studies / "labels").exists()


def as_a_user(code: str, *arguments: str) -> str:
    """What a process says that permissions hold, whoever runs this."""
    command = [sys.executable, "-c", code, *arguments]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
                          capture_output=True, text=True).stdout  # fmt: skip


APART = """
import sys
from pathlib import Path
from apps.monailabel.lib.errors import Conflict
from apps.monailabel.lib.local_store import LocalStore
store = LocalStore(Path(sys.argv[1]), None, labels=Path(sys.argv[2]))
store.save_label("a.nii.gz", sys.argv[3], "original", {})
store.update_image_info("case 7/venous", {"a": 1})
try:
    store.add_image("n", sys.argv[4], {})
except Conflict as error:
    sys.stdout.write(str(error))
"""


def test_labels_of_read_only_studies_go_to_a_folder_of_their_own(studies: Path, tmp_path: Path) -> None:
    before, labels, new = files_below(studies), tmp_path / "labels of ward 3", tmp_path / "new.nii.gz"
    new.write_bytes(b"a volume")
    studies.chmod(0o555)
    try:
        said = as_a_user(APART, str(studies), str(labels), write(tmp_path / "sent.json", LABEL), str(new))
    finally:
        studies.chmod(0o755)
    assert said == "image n.nii.gz cannot be stored: the server may not write to the studies folder"
    store = LocalStore(studies, TABLE, EXCLUDE, labels=labels)
    assert (store.root, store.images_root, store.name()) == (labels, studies, "studies")
    assert store.label("a.nii.gz", "original") == LABEL
    assert store.get_image_info("case 7/venous")["a"] == 1
    save(store, "case 7/venous", tmp_path)
    assert store.datalist()[0]["label"] == str(labels / "labels" / "final" / "case 7" / "venous.json")
    assert store.datalist()[0]["image"] == str(studies / "case 7" / "venous")
    assert files_below(studies) == before
    assert open_store(studies).get_labeled_images() == [], "a store without it looks in the studies"


def test_labels_apart_but_within_the_studies_are_no_images(studies: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_to = studies / "case [7]"
    (write_to / "labels" / "final").mkdir(parents=True)
    (write_to / "labels" / "final" / "x.nii.gz").write_bytes(b"no image")
    store = LocalStore(studies, TABLE, labels=write_to)
    assert store.list_images() == ["a.nii.gz", "b.nii.gz", "case 7/venous"]
    assert "are not used" not in caplog.text
    (studies / "labels" / "final").mkdir(parents=True)
    LocalStore(studies, TABLE, EXCLUDE, labels=write_to)
    assert "those in labels of the studies are not used" in caplog.text


def of_patient(folder: Path, patient: str | None) -> Path:
    """A DICOM series whose header says so; None for a header without the element."""
    folder.mkdir(parents=True)
    for path in (ROOT / "tests" / "data" / "crlm_ct_1004").iterdir():
        image = dcmread(path)
        if patient is None:
            del image.PatientID
        else:
            image.PatientID = patient
        image.save_as(folder / path.name)
    return folder


def patients(store: LocalStore) -> dict[str, str]:
    return {item["id"]: item["patient_id"] for item in store.items()}


def test_series_are_one_patients_by_their_headers(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    for name, patient in {"p/1": "P 7", "p/2": "P 7", "q": "P 8", "blank": " ", "none": None,
                          "train_images/10004/21057": "P 7"}.items():  # fmt: skip
        of_patient(studies / name, patient)
    (studies / "n.nii.gz").write_bytes(b"a volume")
    store = open_store(studies)
    assert patients(store) == {"p/1": "P 7", "p/2": "P 7", "q": "P 8", "blank": "blank", "none": "none",
                               "n.nii.gz": "n.nii.gz", "train_images/10004/21057": "10004"}  # fmt: skip
    for image in ("p/1", "p/2"):
        save(store, image, tmp_path)
    assert [item["patient_id"] for item in store.datalist()] == ["P 7", "P 7"]


def test_headers_are_read_once_and_only_where_patients_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(patients_of, "dcmread", lambda path, **options: (read.append(path.parent.name),
                                                                         dcmread(path, **options))[1])  # fmt: skip
    studies, cache = tmp_path / "studies", tmp_path / "cache"
    for name in "abc":
        of_patient(studies / name, "P 7")
    store = LocalStore(studies, TABLE, EXCLUDE, cache)
    store.list_images(), store.items(patients=False), store.status(), store.json(), store.get_unlabeled_images()
    assert store.get_image_info("a")["patient_id"] == "a"
    assert read == []
    assert set(patients(store).values()) == {"P 7"}
    assert sorted(read) == ["a", "b", "c"], "one file of each"
    again = LocalStore(studies, TABLE, EXCLUDE, cache)
    assert patients(store) == patients(again)
    assert len(read) == 3, "another process does not read them again"
    for path in (studies / "b").iterdir():  # in place, so that the folder does not change
        image = dcmread(path)
        image.PatientID = "P 9"
        image.save_as(path)
    assert [patients(each)["b"] for each in (store, again)] == ["P 9", "P 9"]
    next((cache / "patients").iterdir()).write_text("{ broken")
    assert patients(LocalStore(studies, TABLE, EXCLUDE, cache)) == {"a": "P 7", "b": "P 9", "c": "P 7"}


def test_one_name_for_all_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        of_patient(tmp_path / name, "ANONYMOUS")
    store = open_store(tmp_path)
    for _ in range(2):
        patients(store)
    assert caplog.text.count("name the same patient") == 1
    assert "all 2 DICOM series name the same patient, 'ANONYMOUS'" in caplog.text
    assert "--conf patients" in caplog.text


def test_a_file_names_the_patients(studies: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("\ufeffimage,patient_id,ward\na.nii.gz,007,3\ncase 7/venous, 007 ,3\n", encoding="utf-8")
    store = LocalStore(studies, TABLE, EXCLUDE, patients=table)
    assert patients(store) == {"a.nii.gz": "007", "b.nii.gz": "b.nii.gz", "case 7/venous": "007"}
    assert store.get_image_info("a.nii.gz")["patient_id"] == "007"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image,patient_id\nx,1\na.nii.gz,\n,2\nb.nii.gz,1\nb.nii.gz,2\n",
         "not among the images: 'x'; image or patient_id blank: row 3, row 4; listed more than once: 'b.nii.gz'"),
        ("image,patient_id\n" + "".join(f"x{number},1\n" for number in range(12)), "'x9' and 2 more"),
        ("image,patient_id\na.nii.gz\n", "blank: row 2"),
        ("name,patient\na.nii.gz,1\n", "expected a CSV with the columns image and patient_id"),
        ("", "expected a CSV with the columns image and patient_id"),
        (None, "expected a CSV with the columns image and patient_id"),
    ],
)  # fmt: skip
def test_a_file_of_patients_that_does_not_fit_is_refused(
    studies: Path, tmp_path: Path, rows: str | None, message: str
) -> None:
    table = tmp_path / "patients.csv"
    if rows is not None:
        table.write_text(rows)
    with pytest.raises(SetupError, match=re.escape(message)) as caught:
        LocalStore(studies, TABLE, EXCLUDE, patients=table)
    assert str(caught.value).startswith(f"--conf patients {table}: ")


def test_a_list_that_takes_long_is_kept_longer(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, listed = open_store(studies), []
    found = store._find()

    def slowly() -> dict:
        listed.append(time.monotonic())
        time.sleep(0.2)
        return found

    monkeypatch.setattr(store, "_find", slowly)
    store.list_images()
    time.sleep(1.2)
    store.list_images()
    assert len(listed) == 1
    with pytest.raises(NotFound):
        store.path("new")
    assert len(listed) == 2, "an unknown image is looked for all the same"


def test_an_image_is_added_once_and_never_removed(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    new = tmp_path / "new.nii.gz"
    new.write_bytes(b"another volume")
    assert store.add_image("c", str(new), {"from": "ward 3"}) == "c.nii.gz"
    assert store.path("c.nii.gz").read_bytes() == b"another volume"
    assert store.get_image_info("c.nii.gz")["from"] == "ward 3"
    with pytest.raises(Conflict, match=r"there is an image a\.nii\.gz already"):
        store.add_image("a", str(new), {})
    for name in ("../c", "a/b", ".hidden", "my_mask", "labels", "x" * 300, "x\ny"):
        with pytest.raises(Unusable, match="image: expected a name of"):
            store.add_image(name, str(new), {})
    with pytest.raises(Unusable, match=r"expected a NIfTI file, \.nii or \.nii\.gz"):
        store.add_image("d", write(tmp_path / "d.txt", "text"), {})
    with pytest.raises(Conflict, match="never deletes images"):
        store.remove_image("c.nii.gz")
    assert sorted(path.name for path in studies.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "case 7", "labels"]


def test_studies_that_are_gone_are_an_error_and_not_empty(studies: Path) -> None:
    store = open_store(studies)
    shutil.rmtree(studies)
    with pytest.raises(Conflict, match="the studies folder is gone"):
        store.list_images()
