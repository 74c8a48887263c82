# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a request is said in one sentence, and nothing outside the studies is ever an image or a label."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import pydicom
import pytest
import requests
from pydicom.uid import generate_uid

from apps.monailabel.lib.errors import TooLarge
from apps.monailabel.lib.uploads import unpack_upload
from tests.ports import free_port

from .conftest import ROOT, UNWEIGHTED, Server, copy_app

DATA = ROOT / "tests" / "data"
NIFTI, DICOM, BROKEN = "lidc_idri_0001.nii.gz", "series", "cut_off.nii.gz"
INFER = "/infer/rsna_cnn_lstm"
LIMIT = 2_000_000
LABEL = json.dumps({"groups": {"spleen": "high"}})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The studies, and beside them a CT that is none of them; both in a folder of their own."""
    home = tmp_path_factory.mktemp("home")
    (home / "studies").mkdir()
    for folder in (home, home / "studies"):
        shutil.copytree(DATA / "crlm_ct_1004", folder / DICOM)
        shutil.copy(DATA / NIFTI, folder)
    (home / "studies" / BROKEN).write_bytes((DATA / NIFTI).read_bytes()[:20_000])
    (home / "studies" / "notes.txt").write_text("no image")
    (home / "link.nii.gz").symlink_to(home / "studies" / NIFTI)
    (home / "secret.json").write_text(LABEL)
    return home


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], home: Path) -> Iterator[Server]:
    server = start_server(
        home / "studies", conf={"upload_limit_mb": str(LIMIT / 1e6), "unpacked_limit_mb": "8", "hosts": "a, ct.example"}
    )
    yield server
    assert server.process.poll() is None  # whatever was asked of it


@pytest.fixture
def empty_pacs() -> Iterator[str]:
    """A DICOMweb server without a series."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/dicom+json")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as pacs:
        threading.Thread(target=pacs.serve_forever).start()
        yield f"http://127.0.0.1:{pacs.server_port}/dicom-web"
        pacs.shutdown()


def refused(reply: requests.Response, status: int, *words: str) -> None:
    """One sentence, of the right status, without a stack trace or a path of this machine."""
    assert reply.status_code == status, reply.text
    detail = reply.json()["detail"]
    text = detail if isinstance(detail, str) else json.dumps(detail)
    assert "Traceback" not in text
    assert 'File "' not in text
    assert str(ROOT) not in text
    assert ".py" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/infer/unknown?image=" + NIFTI, ("'unknown'", "rsna_cnn_lstm")),
        ("POST", "/infer/voco2d_pretrain?image=" + NIFTI, ("expected rsna_cnn_lstm",)),
        ("POST", "/batch/infer/unknown", ("'unknown'",)),
        ("POST", "/train/unknown", ("'unknown'", "voco2d_pretrain")),
        ("POST", "/scoring/unknown", ("'unknown'", "entropy")),
        ("POST", "/activelearning/unknown", ("'unknown'", "uncertain")),
        ("GET", "/versions/unknown", ("'unknown'",)),
        ("PUT", "/versions/rsna_cnn_lstm?version=9999", ("9999",)),
        ("PUT", "/versions/rsna_cnn_lstm?version=../../x", ("../../x",)),
        ("GET", "/model/unknown", ("'unknown'",)),
        ("GET", "/model/info/unknown", ("'unknown'",)),
        ("POST", INFER + "?image=unknown", ("'unknown'", "of these studies")),
        ("GET", "/datastore/image?image=unknown", ("'unknown'",)),
        ("GET", "/datastore/image/info?image=unknown", ("'unknown'",)),
        ("GET", f"/datastore/label?label={NIFTI}&tag=final", ("no label final",)),
        ("GET", f"/datastore/image?image={DICOM}", ("DICOM series",)),
        ("GET", "/nowhere", ("Not Found",)),
    ],
)
def test_what_is_not_there_is_404(server: Server, method: str, path: str, words: tuple[str, ...]) -> None:
    refused(server.request(method, path), 404, *words)


def test_an_unreadable_image_is_422_with_the_bundles_message(server: Server) -> None:
    refused(server.post(INFER, params={"image": BROKEN}), 422, BROKEN, "expected a readable NIfTI file", "damaged")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, ("expected either image",)),
        ({"image": NIFTI, "output": "image"}, ("output", "expected json")),
        ({"image": NIFTI, "output": "dicom_seg"}, ("output",)),
        ({"image": NIFTI, "session_id": "../../x"}, ("session_id",)),
    ],
)
def test_a_request_that_makes_no_sense_is_422(server: Server, params: dict[str, str], words: tuple[str, ...]) -> None:
    refused(server.post(INFER, params=params), 422, *words)


def outside(home: Path) -> list[str]:
    """CTs, and more, that are no image of the studies."""
    studies = home / "studies"
    return [
        str(home / NIFTI),
        str(home / DICOM),
        f"../{NIFTI}",
        f"{DICOM}/../../{DICOM}",
        str(home / "link.nii.gz"),
        f"file://{studies / NIFTI}",
        str(studies),
        str(studies / DICOM / "1-18.dcm"),
        str(studies / "notes.txt"),
        "/etc/passwd",
        "/dev/stdin",
        ".",
        "/",
        "~",
        f"{NIFTI}\0",
        "http://127.0.0.1:1/x.nii.gz",
    ]


def test_no_image_outside_the_studies(server: Server, home: Path) -> None:
    for image in outside(home):
        refused(server.post(INFER, params={"image": image}), 404, "among")
        for path in ("/datastore/image", "/datastore/image/info", "/review/volume", "/review/evidence.png"):
            refused(server.get(path, params={"image": image}), 404)
        refused(server.put("/datastore/label", params={"image": image}, files={"label": ("l.json", LABEL)}), 404)
        refused(server.put("/datastore/image/info", params={"image": image}, data={"info": "{}"}), 404)


@pytest.mark.parametrize("name", ["image", "images", "model", "session_id", "result_path", "weights", "device", "tta"])
def test_parameters_smuggle_nothing(server: Server, home: Path, name: str) -> None:
    params = {name: str(home / NIFTI)}
    refused(server.post(INFER, params={"image": NIFTI}, data={"params": json.dumps(params)}), 422, name)
    refused(server.post("/batch/infer/rsna_cnn_lstm", params={"run_sync": True}, json=params), 422, name)
    refused(server.post("/train/rsna_cnn_lstm", params={"run_sync": True}, json=params), 422, name)


@pytest.mark.parametrize("params", ["[1]", "{", "null", "[" * 5000, '{"label_tag": "final"}', '{"evidence": "../x"}'])
def test_parameters_that_are_none(server: Server, params: str) -> None:
    refused(server.post(INFER, params={"image": NIFTI}, data={"params": params}), 422)


def test_no_label_outside_the_labels(server: Server, home: Path) -> None:
    places = [(image, "final") for image in (*outside(home), "../../secret")]
    places += [(NIFTI, tag) for tag in ("../..", "..", "/", str(home), "a/b", ".notes", "final/..")]
    for label, tag in places:
        for path in ("/datastore/label", "/datastore/label/info"):
            assert server.get(path, params={"label": label, "tag": tag}).status_code in (404, 422)
        assert server.request("HEAD", "/datastore/label", params={"image": label, "tag": tag}).status_code in (404, 422)
        assert server.request("DELETE", "/datastore/label", params={"id": label, "tag": tag}).status_code in (404, 422)
        put = {"image": label, "tag": tag}
        assert server.put("/datastore/label", params=put, files={"label": LABEL}).status_code in (404, 422)
    assert json.loads((home / "secret.json").read_text()) == json.loads(LABEL)
    assert sorted(path.name for path in home.iterdir()) == [NIFTI, "link.nii.gz", "secret.json", DICOM, "studies"]


@pytest.mark.parametrize(
    "label", ["", "no json", "[]", '{"groups": {"heart": "high"}}', '{"groups": {"liver": "low"}, "path": "/x"}']
)
def test_a_label_that_is_none_is_422(server: Server, label: str) -> None:
    refused(server.put("/datastore/label", params={"image": NIFTI}, files={"label": ("l.json", label)}), 422, "label")


def test_notes_of_the_server_are_its_own(server: Server) -> None:
    put = {"params": {"image": NIFTI}, "data": {"info": '{"entropy": 1.0}'}}
    refused(server.put("/datastore/image/info", **put), 422, "entropy")


def test_a_scoring_that_could_not_begin_is_refused_at_once(server: Server) -> None:
    refused(server.post("/scoring/entropy", json={"max_images": 0}), 422, "max_images: expected a whole number")


def test_an_upload_above_the_limit_is_413(server: Server, home: Path) -> None:
    large = b"\0" * (LIMIT + 1)
    refused(server.post(INFER, files={"file": large}), 413, "2 MB")
    refused(server.put("/datastore/image", files={"file": ("x.nii", large)}), 413, "2 MB")
    refused(server.put("/datastore/label", params={"image": NIFTI}, files={"label": b" " * 1_500_000}), 413, "1 MB")
    refused(server.post("/train/rsna_cnn_lstm", json={"x": "x" * 1_500_000}), 413, "1 MB")
    refused(server.post(INFER, params={"image": NIFTI}, data={"params": " " * 1_500_000}), 413, "1 MB")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/activelearning/first"),
        ("POST", "/train/rsna_cnn_lstm"),
        ("POST", "/batch/infer/rsna_cnn_lstm"),
        ("PUT", "/datastore/label?image=" + NIFTI),
        ("PUT", "/datastore/image/info?image=" + NIFTI),
        ("GET", "/info/"),
        ("POST", "/nowhere"),
    ],
)
def test_only_images_may_be_large(server: Server, method: str, path: str) -> None:
    """Everything else is kept in memory, whatever kind of body it says it is."""
    refused(server.request(method, path, files={"file": b"\0" * 1_500_000}), 413, "1 MB")


def test_a_form_of_many_parts_is_refused(server: Server) -> None:
    for image in (INFER, "/datastore/image"):
        method = "PUT" if image == "/datastore/image" else "POST"
        fields = {str(number): (None, "x") for number in range(9)}
        refused(server.request(method, image, files=fields), 400, "Too many fields")
        refused(server.request(method, image, files={"file": b"x", "more": b"x"}), 400, "Too many files")
        refused(server.request(method, image, files={"params": (None, "x" * 1_100_000)}), 400, "exceeded")


def test_what_was_sent_is_not_sent_back(server: Server) -> None:
    for reply in (
        server.post("/train/rsna_cnn_lstm", json=["Doe^Jane"]),
        server.post("/activelearning/first", data=b"Doe^Jane", headers={"Content-Type": "text/plain"}),
        server.get("/datastore/", params={"output": "Doe^Jane"}),
    ):
        refused(reply, 422, "loc", "msg")
        assert "Doe^Jane" not in reply.text


def test_the_list_to_train_with_has_ids_and_no_paths(server: Server, home: Path) -> None:
    assert server.put("/datastore/label", params={"image": NIFTI}, files={"label": LABEL}).ok
    reply = server.get("/datastore/", params={"output": "train"})
    assert reply.json() == [{"image": NIFTI, "label": NIFTI, "tag": "final"}]
    assert str(home) not in server.get("/datastore/", params={"output": "all"}).text
    assert server.request("DELETE", "/datastore/label", params={"id": NIFTI, "tag": "final"}).ok


def test_an_upload_of_unknown_length_is_counted(server: Server) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.nii"\r\n\r\n'
        for _ in range(100):
            yield b"\0" * 100_000
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        refused(server.post(INFER, data=body(), headers=headers), 413)
    except requests.ConnectionError:  # it hung up on us: so be it, if it still answers others
        assert server.get("/info/").ok


def zip_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def two_series(home: Path) -> bytes:
    """The same slices again, but for the UIDs of their series and their own."""
    first, second = [path.read_bytes() for path in sorted((home / DICOM).iterdir())[:4]], []
    series = generate_uid()
    for content in first:
        slice_ = pydicom.dcmread(io.BytesIO(content))
        slice_.SeriesInstanceUID, slice_.SOPInstanceUID = series, generate_uid()
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        buffer = io.BytesIO()
        slice_.save_as(buffer)
        second.append(buffer.getvalue())
    return zip_of(*((f"{name}/{n}.dcm", c) for name, part in (("a", first), ("b", second)) for n, c in enumerate(part)))


def test_uploads_that_are_no_series_are_422(server: Server, home: Path) -> None:
    slices = [path.read_bytes() for path in sorted((home / DICOM).iterdir())]
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = 0o120777 << 16
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as archive:
        archive.writestr(link, str(home / DICOM / "1-18.dcm"))
    whole = zip_of(*((f"{n}.dcm", c) for n, c in enumerate(slices)))
    uploads = {
        "another kind": b"GIF89a" + b"\0" * 500,
        "kind of file": b"",
        "damaged .gz": (DATA / NIFTI).read_bytes()[:50_000],
        "empty zip": zip_of(("__MACOSX/x", b"1")),
        "cannot be unpacked": whole[: len(whole) // 2],
        "series": zip_of(("../../../evil.dcm", b"\0" * 200), ("/etc/evil.dcm", b"\0" * 200)),
        "upload": zip_of(*((f"{n}.dcm", c) for n, c in enumerate(slices) if n != 3)),
        "expected one series, found 2": two_series(home),
        ".gz of another kind": gzip.compress(b"\0" * 30_000_000),
        "link": linked.getvalue(),
    }
    for name, content in uploads.items():
        words = (name,) if name not in ("series", "upload", "link") else ()
        refused(server.post(INFER, files={"file": ("/etc/../x.nii.gz", content)}), 422, *words)
    assert not list(home.rglob("evil*"))


def test_bombs_are_413(server: Server) -> None:
    zeros = b"\0" * 30_000_000
    header = nib.Nifti1Header()
    header.set_data_shape((10, 10, 10))
    for bomb in (
        zip_of(("a.dcm", zeros)),
        zip_of(*((f"{n}.dcm", zeros[:3_000_000]) for n in range(8))),
        gzip.compress(header.binaryblock + zeros),
    ):
        assert len(bomb) < LIMIT
        refused(server.post(INFER, files={"file": bomb}), 413, "unpacks to more than 8 MB")
    many = zip_of(*((f"{n}.dcm", b"") for n in range(10_001)))
    refused(server.post(INFER, files={"file": many}), 413, "10001 files")


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("endianness", "<>")
def test_a_volume_too_large_is_told_by_its_header(kind: type, endianness: str, tmp_path: Path) -> None:
    """Nothing of it is unpacked."""
    header = kind(endianness=endianness)
    header.set_data_dtype("int16")
    header.set_data_shape((512, 512, 16))  # 8.4 MB
    content = header.binaryblock + b"\0" * 100
    for upload in (content, gzip.compress(content)):
        with pytest.raises(TooLarge, match="more than 8 MB"):
            unpack_upload(io.BytesIO(upload), tmp_path, 8_000_000)
    assert list(tmp_path.iterdir()) == [] or (tmp_path / "series.nii").stat().st_size == 0


def test_a_zip_that_lies_about_its_size(server: Server) -> None:
    content = bytearray(zip_of(("a.dcm", b"\0" * 30_000_000)))
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = (1000).to_bytes(4, "little")
    assert server.post(INFER, files={"file": bytes(content)}).status_code in (413, 422)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/model/rsna_cnn_lstm"),
        ("DELETE", "/model/rsna_cnn_lstm"),
        ("POST", f"/infer/wsi/rsna_cnn_lstm?image={NIFTI}"),
        ("POST", f"/infer/wsi_v2/rsna_cnn_lstm?image={NIFTI}"),
        ("PUT", "/session/"),
        ("GET", "/session/x"),
        ("DELETE", "/session/x"),
        ("GET", "/proxy/dicom/qido/studies"),
        ("POST", "/proxy/dicom/stow/studies"),
        ("GET", "/ohif/index.html"),
        ("GET", "/logs/"),
        ("GET", "/logs/gpu"),
        ("POST", "/reload"),
        ("GET", "/docs"),
        ("GET", "/datastore/dataset"),
        ("PUT", "/datastore/updatelabelinfo"),
    ],
)
def test_closed_routes_say_so(server: Server, method: str, path: str) -> None:
    refused(server.request(method, path, files={"files": b"x"} if method == "PUT" else None), 403, "closed in this app")


def test_images_are_never_deleted(server: Server, home: Path) -> None:
    refused(server.request("DELETE", "/datastore/image", params={"id": NIFTI}), 409, "never deletes")
    assert (home / "studies" / NIFTI).is_file()


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        refused(server.get("/info/", headers={"Origin": origin}), 403)
        reply = server.request("OPTIONS", "/info/", headers={"Origin": origin, "Access-Control-Request-Method": "PUT"})
        assert "access-control-allow-origin" not in reply.headers
    assert server.get("/info/", headers={"Origin": server.url}).ok


def test_a_server_of_another_name_is_refused(server: Server) -> None:
    """The browser takes a page of evil.example for one of this server, once that name points to it."""
    port = server.url.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::1",
        "",
    ):
        refused(server.get("/info/", headers={"Host": host, "Origin": f"http://{host}"}), 403, "--conf hosts")
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", f"10.1.2.3:{port}", "CT.example:80"):
        assert server.get("/info/", headers={"Host": host}).ok


def test_a_broken_body_is_no_crash(server: Server) -> None:
    json_headers = {"Content-Type": "application/json"}
    assert server.post("/train/rsna_cnn_lstm", data=b"{", headers=json_headers).status_code == 422
    assert server.post("/train/rsna_cnn_lstm", json=[1]).status_code == 422
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert server.post(INFER, params={"image": NIFTI}, data=b"\xff\xfe", headers=headers).status_code in (200, 400)


def test_tasks_show_no_stack_trace(server: Server) -> None:
    """Too few labels to train: the process of the task ends with our message."""
    assert server.post("/train/rsna_cnn_lstm", json={}).status_code == 200
    state = server.wait_for("train")
    assert state["status"] == "ERROR"
    text = "\n".join(state["details"])
    assert "Traceback" not in text
    assert 'File "' not in text
    assert str(ROOT) not in text
    assert state["details"][-1].startswith("error: ")


def test_without_weights_inference_says_what_to_do(start_server: Callable[..., Server], home: Path) -> None:
    server = start_server(home / "studies", shipped=None, environment={"MONAI_LABEL_AUTO_UPDATE_SCORING": "true"})
    refused(server.get("/scoring/"), 404, "No Scoring")  # there is nothing to score with
    refused(server.post(INFER, params={"image": NIFTI}), 409, "no weights yet", "--conf weights")
    refused(server.get("/model/rsna_cnn_lstm"), 404)
    assert server.get("/info/").json()["models"]["rsna_cnn_lstm"]["version"] is None
    assert server.post("/activelearning/first").json()["id"] == BROKEN
    weights = server.log.parent / "bundles" / "rsna_cnn_lstm" / "models" / "model.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"no weights")
    refused(server.post(INFER, params={"image": NIFTI}), 409, "cannot be run: model.pt: ")


def test_weights_whose_card_warns_are_not_served_by_themselves(
    start_server: Callable[..., Server], home: Path, weights: Path, tmp_path: Path
) -> None:
    """A reader would see their predictions, and trainings begin with them."""
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles", ignore=UNWEIGHTED)
    models = tmp_path / "bundles" / "rsna_cnn_lstm" / "models"
    models.mkdir()
    shutil.copy(weights, models)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (models / "MODEL_CARD.md").write_text(f"> **Trained on synthetic injuries.**\n\n{digest}\n")
    server = start_server(home / "studies", shipped=None, conf={"bundles": str(tmp_path / "bundles")})
    refused(server.post(INFER, params={"image": NIFTI}), 409, "no weights yet", "--conf weights")
    assert server.get("/info/").json()["models"]["rsna_cnn_lstm"]["version"] is None
    assert server.get("/versions/rsna_cnn_lstm").json() == []
    log = server.log.read_text()
    assert log.count("model.pt is not served: Trained on synthetic injuries. Name it") == 1


@pytest.mark.parametrize("place", ["folder", "PACS"])
def test_scoring_starts_by_itself_over_a_folder_alone(
    start_server: Callable[..., Server], home: Path, empty_pacs: str, place: str
) -> None:
    """To score a PACS is to fetch all of it."""
    studies = empty_pacs if place == "PACS" else home / "studies"
    server = start_server(studies, environment={"MONAI_LABEL_AUTO_UPDATE_SCORING": "true"})
    assert server.get("/scoring/").status_code == (404 if place == "PACS" else 200)


@pytest.mark.parametrize(
    ("studies", "conf", "words"),
    [
        (".", ("modles", "x"), "--conf modles: unknown; known are models, bundles"),
        (".", ("weights", "/nowhere.pt"), "--conf weights: expected a file, found none at /nowhere.pt"),
        (".", ("bundles", "/nowhere"), "--conf bundles: expected"),
        ("http://127.0.0.1:9/dicom-web", ("patients", __file__), "--conf patients: is for a folder of studies"),
    ],
)
def test_a_wrong_conf_stops_the_start(tmp_path: Path, studies: str, conf: tuple[str, str], words: str) -> None:
    app = copy_app(tmp_path / "app")
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", studies]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--conf", "bundles", str(ROOT / "bundles")]
    done = subprocess.run([*command, "--conf", *conf], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert words in said
    assert "Traceback" not in said
    assert 'File "' not in said
