# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A bundle as a folder and a zip that stand alone: what the MONAI Model Zoo, the Hugging Face Hub or a colleague takes.

    python -m tools.pack --weights voco2d_pretrain=out/pretrain/model.pt --weights rsna_cnn_lstm=out/fold0/model.pt

writes ``dist/NAME/`` and ``dist/NAME_vVERSION.zip`` with real files in place of the links, and the zoo's unit tests in
``dist/ci/unit_tests/``. The same content gives the same bytes, whenever and wherever it is packed with the same zlib.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from workflow.errors import root_cause
from workflow.run import write_atomically

from .bundle_files import PackError, bundle_files, check_folder, check_zip, write_zip
from .bundle_weights import large_files, read_default_weights, weights_card, weights_files

__all__ = ["main", "pack"]

logger = logging.getLogger("pack")

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")


def pack(
    name: str,
    out: Path,
    *,
    weights: Path | None = None,
    url: str | None = None,
    allow_config_mismatch: bool = False,
    root: Path = ROOT,
) -> Path:
    """Pack one bundle into ``out/name`` and ``out/name_vVERSION.zip``; an older one is replaced when all is checked.

    Args:
        name: folder in ``bundles/``.
        out: made if needed.
        weights: flat ``model.pt`` for the bundle's default network; default is ``bundles/name/models/model.pt``, with
            its model card, where there is one.
        url: where `weights` will lie; they are then named in ``large_files.yml`` instead of packed.
        allow_config_mismatch: take weights that were trained with another input than the bundle's default.
        root: of the repository.

    Returns:
        The zip.

    Raises:
        PackError, WeightsError, ConfigMismatch: saying what is wrong; nothing is written then.
    """
    sources = bundle_files(root, name)
    made = _weights(root, name, weights, url, allow_config_mismatch)
    out = out.absolute()
    folder = out / name
    if out.resolve().is_relative_to((root / "bundles").resolve()):
        raise PackError(f"--out {out}: expected a folder outside bundles/, which hold what is packed")
    if folder.exists() and not (folder / "configs" / "metadata.json").is_file():
        raise PackError(f"{folder}: expected a packed bundle or nothing, found something else: not replaced")
    version = json.loads(sources[PurePosixPath("configs/metadata.json")].read_text(encoding="utf-8"))["version"]
    archive = out / f"{name}_v{version}.zip"
    with _workplace(out) as place:
        fresh = place / name
        for path, source in sources.items():
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, fresh / path)
        for path, content in made.items():
            write_atomically(fresh / path, content)
        check_folder(fresh, sources, made)
        write_zip(fresh, place / archive.name)
        check_zip(place / archive.name, fresh)
        if folder.exists():
            folder.rename(place / "older")
        fresh.rename(folder)
        os.replace(place / archive.name, archive)
    logger.info("%s: %d files in %s and %s", name, len(sources) + len(made), folder, archive)
    return archive


def _weights(root: Path, name: str, weights: Path | None, url: str | None, allow: bool) -> dict[PurePosixPath, bytes]:
    """The files that weights become; none, with a word on what that means, where there are no weights."""
    own = root / "bundles" / name / "models" / "model.pt"
    path = weights if weights is not None else own
    if weights is None and url is not None:
        raise PackError(f"--weights-url: its sha256 needs the file that will lie there: give --weights {name}=FILE")
    if weights is None and not own.is_file():
        logger.warning(
            "%s: packed without weights. Training works; inference and evaluation need --weights FILE; ckpt_export, "
            "monai.bundle.load() and the zoo's verify_bundle.py have nothing to load (--weights %s=FILE packs some)",
            name,
            name,
        )
        return {}
    state = read_default_weights(root, name, path, allow_mismatch=allow)
    card = weights_card(path, shipped=weights is None)
    what = f"{name}: weights of {path}{' and their model card' if card else ''} go with it"
    if card and weights is None:  # the bundle's own, of which its documents speak
        logger.info(what)
    else:
        logger.warning(
            "%s. Before publishing state in docs/data_license.txt and under Performance in docs/README.md on which "
            "data they were trained, under which licence they are and what they reach",
            what,
        )
    return {**card, **(weights_files(path, state) if url is None else large_files(path, url))}


def copy_unit_tests(name: str, out: Path, root: Path = ROOT) -> None:
    """The bundle's unit tests in the zoo's form, beside the packed bundles as in the zoo: ``ci/unit_tests/``."""
    for test in sorted((root / "tests" / "zoo").glob(f"test_{name}*.py")):
        write_atomically(out / "ci" / "unit_tests" / test.name, test.read_bytes())


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A hidden folder in `out`, on the same disk, where nothing has its final name yet; gone afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".pack-", dir=out))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (separator and name and value):
        raise argparse.ArgumentTypeError(f"expected BUNDLE=VALUE, got {text!r}")
    return name, value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help=f"default: {' '.join(BUNDLES)}")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for both forms of each bundle")
    parser.add_argument("--weights", type=_pair, action="append", default=[], metavar="BUNDLE=FILE",
                        help="flat model.pt for the bundle's default network")  # fmt: skip
    parser.add_argument("--weights-url", type=_pair, action="append", default=[], metavar="BUNDLE=URL",
                        help="where the model.pt of --weights will lie (https), instead of packing it")  # fmt: skip
    parser.add_argument("--allow-config-mismatch", action="store_true",
                        help="weights that were trained with another input than the bundle's default")  # fmt: skip
    args = parser.parse_args(argv)
    args.bundles = args.bundles or list(BUNDLES)
    args.weights, args.weights_url = dict(args.weights), dict(args.weights_url)
    unknown = {*args.weights, *args.weights_url} - set(args.bundles)
    if unknown:
        parser.error(f"weights for {', '.join(sorted(unknown))}, which is not packed: {' '.join(args.bundles)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bundle could not be packed (nothing of it is left then)."""
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in args.bundles:
        weights, url = args.weights.get(name), args.weights_url.get(name)
        try:
            pack(name, args.out, weights=Path(weights) if weights else None, url=url,
                 allow_config_mismatch=args.allow_config_mismatch)  # fmt: skip
            copy_unit_tests(name, args.out)
        except (ValueError, OSError) as error:
            logger.error("%s: not packed: %s", name, root_cause(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
