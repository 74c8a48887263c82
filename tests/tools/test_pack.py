# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Packing: what goes in, what stays out, what is refused, and what is left when something goes wrong. The weights here
are those of a network as it is initialised: only the files matter."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from monai.apps.utils import HashCheckError
from monai.bundle import download_large_files
from networks import Backbone
from safetensors.torch import load_file
from torch import Tensor
from workflow.card import card_notice
from workflow.provenance import ConfigMismatch
from workflow.weights import WeightsError

from tools import bundle_files
from tools import pack as packing
from tools.bundle_files import PackError, check_folder, check_zip, write_zip
from tools.bundle_weights import default_network
from tools.pack import BUNDLES, main, pack

VOCO, RSNA = BUNDLES
PARTS = ("networks", "transforms", "workflow")
WEIGHTS_FILES = {"model.pt", "model.safetensors", "SHA256SUMS"}
NOTICE = "Trained on synthetic injuries, not for clinical use."
bundles = pytest.mark.parametrize("bundle", BUNDLES)


@pytest.fixture(scope="module")
def small(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's bundles, links and all, whose default network is a small one."""
    top = tmp_path_factory.mktemp("small")
    for name in ("bundles", *PARTS):
        unwanted = shutil.ignore_patterns("__pycache__", ".coverage*", "models")
        shutil.copytree(root / name, top / name, symlinks=True, ignore=unwanted)
    for name in BUNDLES:
        file = top / "bundles" / name / "configs" / "inference.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"efficientnet_b0"', '"test_efficientnet"'))
    return top


@pytest.fixture
def checkout(small: Path, tmp_path: Path) -> Path:
    """Its copy, in which a test may sow faults."""
    return Path(shutil.copytree(small, tmp_path / "checkout", symlinks=True))


@pytest.fixture(scope="module")
def initial(small: Path) -> dict[str, dict[str, Tensor]]:
    return {name: default_network(small, name).state_dict() for name in BUNDLES}


@pytest.fixture
def weights(initial: dict[str, dict[str, Tensor]], tmp_path: Path) -> Callable[..., Path]:
    """A file of a bundle's tensors, or of what a test makes of them."""

    def write(name: str, change: Callable[[dict[str, Tensor]], object] = dict) -> Path:
        path = tmp_path / "run" / f"{name}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(change(dict(initial[name])), path)
        return path

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@bundles
def test_folder_and_zip_hold_real_files_and_nothing_else(checkout: Path, bundle: str, tmp_path: Path) -> None:
    source, out = checkout / "bundles" / bundle, tmp_path / "dist"
    for name in ("scripts/__pycache__/a.pyc", "docs/.DS_Store", ".coverage.1", "eval/schema.json", "run/log.txt",
                 "models/other.pt", "patient.nii.gz"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("not to be shared")
    archive = pack(bundle, out, root=checkout)
    version = json.loads((source / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    assert archive == out / f"{bundle}_v{version}.zip"
    assert {path.name for path in out.iterdir()} == {bundle, archive.name}
    packed = contents(out / bundle)
    assert {name.split("/")[0] for name in packed} == {"LICENSE", "configs", "docs", "scripts", *PARTS}
    assert b"not to be shared" not in packed.values()
    assert not [path for path in (out / bundle).rglob("*") if path.is_symlink()]
    for part in PARTS:
        expected = {f"{part}/{name}": text for name, text in contents(checkout / part).items()}
        assert {name: text for name, text in packed.items() if name.startswith(f"{part}/")} == expected
    with zipfile.ZipFile(archive) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == {
            f"{bundle}/{name}": text for name, text in packed.items()
        }
        assert all(entry.external_attr >> 16 == 0o100644 for entry in opened.infolist())


def test_the_same_content_gives_the_same_bytes(checkout: Path, small: Path, weights, tmp_path: Path) -> None:
    file = weights(VOCO)
    first = pack(VOCO, tmp_path / "a", weights=file, root=checkout).read_bytes()
    for path in (checkout / "transforms").iterdir():
        os.utime(path, (0, 0))
        path.chmod(0o600)
    assert pack(VOCO, tmp_path / "a", weights=file, root=checkout).read_bytes() == first
    assert pack(VOCO, tmp_path / "b", weights=file, root=small).read_bytes() == first


@bundles
def test_weights_are_packed_with_safetensors_and_checksums(
    checkout: Path, weights, bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = weights(bundle)
    own = checkout / "bundles" / bundle / "models" / "model.pt"
    own.parent.mkdir()
    shutil.copy(file, own)  # taken where none is named
    pack(bundle, tmp_path, root=checkout)
    assert "Before publishing state in docs/data_license.txt and under Performance" in caplog.text
    models = tmp_path / bundle / "models"
    assert {path.name for path in models.iterdir()} == WEIGHTS_FILES
    assert (models / "model.pt").read_bytes() == file.read_bytes()
    state, same = torch.load(file, weights_only=True), load_file(models / "model.safetensors")
    assert set(state) == set(same)
    assert all(torch.equal(state[name], same[name]) for name in state)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=models, capture_output=True).returncode == 0
    (models / "model.safetensors").write_bytes(b"other")
    assert subprocess.run(check, cwd=models, capture_output=True).returncode == 1


def test_a_card_goes_with_the_weights_that_it_names_and_no_others(
    checkout: Path, weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, models = weights(VOCO), checkout / "bundles" / VOCO / "models"
    models.mkdir()
    shutil.copy(file, models / "model.pt")
    (models / "MODEL_CARD.md").write_text(f"> **{NOTICE}**\n\nsha256 {hashlib.sha256(file.read_bytes()).hexdigest()}\n")
    pack(VOCO, tmp_path / "own", root=checkout)
    assert "Before publishing" not in caplog.text
    packed = tmp_path / "own" / VOCO / "models"
    assert {path.name for path in packed.iterdir()} == {*WEIGHTS_FILES, "MODEL_CARD.md"}
    assert card_notice(packed / "model.pt") == NOTICE
    url = "https://example.org/model.pt"
    pack(VOCO, tmp_path / "url", weights=models / "model.pt", url=url, root=checkout)
    assert "and their model card go with it. Before publishing state" in caplog.text  # one's own, card or no card
    assert {path.name for path in (tmp_path / "url" / VOCO / "models").iterdir()} == {"MODEL_CARD.md"}
    other = weights(VOCO, lambda state: {name: tensor + 1 for name, tensor in state.items()})
    pack(VOCO, tmp_path / "other", weights=other, root=checkout)
    assert {path.name for path in (tmp_path / "other" / VOCO / "models").iterdir()} == WEIGHTS_FILES
    shutil.copy(other, models / "model.pt")
    with pytest.raises(
        PackError, match=r"MODEL_CARD\.md: expected the card of model\.pt, sha256 \w{64}, found that of"
    ):
        pack(VOCO, tmp_path / "refused", root=checkout)
    assert not (tmp_path / "refused").exists()


def test_weights_elsewhere_are_named_with_their_checksum(small: Path, weights, tmp_path: Path) -> None:
    url = "https://example.org/voco2d_pretrain/model.pt"
    pack(VOCO, tmp_path, weights=weights(VOCO), url=url, root=small)
    folder = tmp_path / VOCO
    assert not (folder / "models").exists()
    (entry,) = yaml.safe_load((folder / "large_files.yml").read_text())["large_files"]
    assert (entry["path"], entry["url"], entry["hash_type"]) == ("models/model.pt", url, "sha256")
    (folder / "models").mkdir()
    shutil.copy(weights(VOCO), folder / "models" / "model.pt")
    download_large_files(str(folder))  # what is there is checked, not fetched
    (folder / "models" / "model.pt").write_bytes(b"other")
    with pytest.raises(HashCheckError):
        download_large_files(str(folder))


@pytest.mark.parametrize("url", ["http://example.org/model.pt", "file:///model.pt", "https://", 'https://a/"b', "a b"])
def test_an_address_that_is_not_https_is_refused(small: Path, weights, url: str, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="begins with https://"):
        pack(VOCO, tmp_path / "dist", weights=weights(VOCO), url=url, root=small)
    assert not (tmp_path / "dist").exists()


def test_an_address_is_of_weights_that_are_named(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else those that the bundle ships would be published under the address of others."""
    url = f"{RSNA}=https://example.org/model.pt"
    assert main([RSNA, "--weights-url", url, "--out", str(tmp_path / "dist")]) == 1
    assert f"needs the file that will lie there: give --weights {RSNA}=FILE" in caplog.text
    assert not (tmp_path / "dist").exists()


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("/tmp/never_made_by_a_pickle",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: Backbone("test_resnet").state_dict(),
            r"\d+ of \d+ voco2d_pretrain network tensors fit; \d+ missing",
        ),
        (lambda state: {"network": state, "epoch": 3}, "expected a flat state dict.*found .'epoch', 'network'"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "expected the names of"),
        (lambda state: {n: v * float("nan") if n.endswith("bias") else v for n, v in state.items()}, "not finite"),
        (lambda state: list(state.values()), "expected a flat state dict.*found list"),
    ],
    ids=["other network", "checkpoint", "prefix", "nan", "list"],
)
def test_weights_that_do_not_load_strictly_are_refused(
    small: Path, weights, change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        pack(VOCO, tmp_path / "dist", weights=weights(VOCO, change), root=small)
    assert not (tmp_path / "dist").exists()


def test_weights_of_a_small_network_are_refused_where_the_default_is_another(
    root: Path, weights, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"of \d+ voco2d_pretrain network tensors fit.*Is it the same backbone_name"):
        pack(VOCO, tmp_path / "dist", weights=weights(VOCO), root=root)
    assert not (tmp_path / "dist").exists()


def test_weights_of_the_other_bundle_none_and_a_pickle_are_refused(small: Path, weights, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="rsna_cnn_lstm network tensors fit"):
        pack(RSNA, tmp_path, weights=weights(VOCO), root=small)
    with pytest.raises(WeightsError, match="found no file"):
        pack(RSNA, tmp_path, weights=tmp_path / "none.pt", root=small)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(WeightsError, match=r"bad\.pt: refused"):
        pack(RSNA, tmp_path, weights=tmp_path / "bad.pt", root=small)
    assert not Path("/tmp/never_made_by_a_pickle").exists()


@bundles
def test_weights_that_were_trained_on_another_input_are_refused(
    small: Path, weights, bundle: str, tmp_path: Path
) -> None:
    """The packed bundle has no config.json beside its weights: who uses it later could not notice."""
    file = weights(bundle)
    (file.parent / "config.json").write_text(json.dumps({"window": [0, 100], "num_workers": 1}))
    with pytest.raises(ConfigMismatch, match=r"window was \[0, 100\] in training"):
        pack(bundle, tmp_path / "dist", weights=file, root=small)
    pack(bundle, tmp_path / "dist", weights=file, allow_config_mismatch=True, root=small)


@pytest.mark.parametrize("link", PARTS)
def test_an_unresolved_link_is_named(checkout: Path, link: str, tmp_path: Path) -> None:
    path = checkout / "bundles" / VOCO / link
    path.unlink()
    with pytest.raises(PackError, match=f"{path}: expected a link .*found nothing"):
        pack(VOCO, tmp_path / "dist", root=checkout)
    path.write_text(f"../../{link}")  # as git leaves it on Windows
    with pytest.raises(PackError, match=f"{path}: expected a link .*found a file: .*no symbolic links"):
        pack(VOCO, tmp_path / "dist", root=checkout)
    path.unlink()
    path.symlink_to(tmp_path)
    with pytest.raises(PackError, match=f"{path}: expected a link to .*, found one to {tmp_path}"):
        pack(VOCO, tmp_path / "dist", root=checkout)
    assert not (tmp_path / "dist").exists()


def test_what_cannot_be_packed_is_named(checkout: Path, tmp_path: Path) -> None:
    folder, out = checkout / "bundles" / VOCO, tmp_path / "dist"
    with pytest.raises(PackError, match="expected a bundle, found none; there are rsna_cnn_lstm, voco2d_pretrain"):
        pack("voco", out, root=checkout)
    with (folder / "docs" / "large.png").open("wb") as file:
        file.truncate(25_000_001)
    with pytest.raises(PackError, match=r"docs/large.png: 25.0 MB, the zoo takes up to 25 MB"):
        pack(VOCO, out, root=checkout)
    (folder / "docs" / "large.png").unlink()
    (folder / "scripts" / "outside.py").symlink_to("/etc/passwd")
    with pytest.raises(PackError, match=r"outside\.py: expected a file or folder, found a link to /etc/passwd"):
        pack(VOCO, out, root=checkout)
    (folder / "scripts" / "outside.py").unlink()
    (folder / "LICENSE").unlink()
    with pytest.raises(PackError, match="expected LICENSE, found none"):
        pack(VOCO, out, root=checkout)
    assert not list(out.iterdir())


def test_nothing_that_is_no_packed_bundle_is_replaced(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="outside bundles/"):
        pack(VOCO, checkout / "bundles", root=checkout)
    (tmp_path / VOCO).mkdir()
    (tmp_path / VOCO / "thesis.tex").write_text("mine")
    with pytest.raises(PackError, match="not replaced"):
        pack(VOCO, tmp_path, root=checkout)
    assert contents(tmp_path / VOCO) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_pack_leaves_what_was_there(checkout: Path, monkeypatch, error, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    pack(VOCO, out, root=checkout)
    before = contents(out)
    (checkout / "transforms" / "new.py").write_text("")

    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(packing, "write_zip", stop)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        pack(VOCO, out, root=checkout)
    assert contents(out) == before
    with pytest.raises(error if isinstance(error, type) else type(error)):
        pack(RSNA, out, root=checkout)
    assert not (out / RSNA).exists()
    monkeypatch.undo()
    pack(VOCO, out, root=checkout)
    assert f"{VOCO}/transforms/new.py" in contents(out)


def test_the_check_finds_what_is_wrong_with_a_packed_bundle(small: Path, tmp_path: Path) -> None:
    archive, folder = pack(VOCO, tmp_path / "dist", root=small), tmp_path / "dist" / VOCO
    sources = bundle_files.bundle_files(small, VOCO)
    check_folder(folder, sources, {})
    check_zip(archive, folder)
    (folder / "scripts" / "loss.py").write_text("")
    with pytest.raises(PackError, match=r"scripts/loss\.py: differs from"):
        check_folder(folder, sources, {})
    with pytest.raises(PackError, match=r"scripts/loss\.py differs from"):
        check_zip(archive, folder)
    (folder / "more").symlink_to("scripts")
    with pytest.raises(PackError, match="more: a link in the packed bundle"):
        check_folder(folder, sources, {})
    (folder / "more").unlink()
    (folder / "more").write_text("")
    with pytest.raises(PackError, match=r"'more'.* too many or too few"):
        check_folder(folder, sources, {})
    with pytest.raises(PackError, match=f"{VOCO}/more"):
        check_zip(archive, folder)
    write_zip(folder, archive)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(f"{VOCO}/../../evil.py", "")
    with pytest.raises(PackError, match=r"evil\.py"):
        check_zip(archive, folder)


@bundles
def test_packing_says_what_is_missing_without_weights(
    small: Path, bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(bundle, tmp_path, root=small)
    assert f"{bundle}: packed without weights. Training works; inference" in caplog.text
    assert not (tmp_path / bundle / "models").exists()


def test_the_command_packs_both_with_the_weights_that_they_ship(
    root: Path, weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pack")
    assert main(["--out", str(tmp_path / "dist")]) == 0
    said = [record.message for record in caplog.records if record.name == "pack"]
    for name in BUNDLES:
        assert [text for text in said if text.startswith(f"{name}: weights of ") and "their model card" in text]
        assert not [text for text in said if "Before publishing" in text]
        assert (tmp_path / "dist" / name / "configs" / "train.json").is_file()
        models = tmp_path / "dist" / name / "models"
        assert {path.name for path in models.iterdir()} == {*WEIGHTS_FILES, "MODEL_CARD.md"}
        assert card_notice(models / "model.pt") == card_notice(models / "model.safetensors") == NOTICE
    tests = {path.name: path.read_bytes() for path in (tmp_path / "dist" / "ci" / "unit_tests").iterdir()}
    assert tests == {path.name: path.read_bytes() for path in (root / "tests" / "zoo").glob("test_*.py")}
    assert set(tests) == {f"test_{name}{suffix}.py" for name in BUNDLES for suffix in ("", "_dist")}
    assert main(["--out", str(tmp_path / "other"), RSNA, "--weights", f"{RSNA}={weights(VOCO)}"]) == 1
    assert "rsna_cnn_lstm: not packed: WeightsError: " in caplog.records[-1].message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "words", [["--weights", "model.pt"], ["--weights", "other=a.pt"], [VOCO, "--weights", f"{RSNA}=a"]]
)
def test_weights_name_a_bundle_that_is_packed(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "expected BUNDLE=VALUE" in (error := capsys.readouterr().err) or "which is not packed" in error
