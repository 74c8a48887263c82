# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The versions that both bundles' metadata.json pin, as constraints for pip: `python tools/pins.py > constraints.txt`.

It runs before anything is installed, so it needs the standard library alone. `===` is equality to the letter:
`==2.13.0` would also take a local build such as 2.13.0+cpu where pip finds one, and the registry's torchvision fails to
import beside that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
FIELDS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}


def pins(path: Path) -> dict[str, str]:
    """Package -> version of one metadata.json."""
    metadata = json.loads(path.read_text(encoding="utf-8"))
    return {name: metadata[field] for name, field in FIELDS.items()} | metadata["required_packages_version"]


def constraints(paths: Iterable[Path]) -> list[str]:
    """`package===version` of all files together, sorted.

    Raises:
        ValueError: two files pin different versions of a package, or a version is not a plain one.
    """
    found: dict[str, tuple[str, Path]] = {}
    for path in paths:
        for name, version in pins(path).items():
            if not version.replace(".post", ".").replace(".", "").isdigit():
                raise ValueError(f"{path}: {name} is pinned to {version!r}, expected a plain version such as 1.2.3")
            other, before = found.setdefault(name, (version, path))
            if other != version:
                raise ValueError(f"{name} is {other} in {before} and {version} in {path}: bundles are tested together")
    if not found:
        raise ValueError("no metadata.json: nothing is pinned")
    return [f"{name}==={version}" for name, (version, _) in sorted(found.items())]


def main(bundles: Path = BUNDLES) -> str | None:
    """Writes the constraints of all bundles to standard output; what is wrong, if anything is."""
    try:
        lines = constraints(sorted(bundles.glob("*/configs/metadata.json")))
    except ValueError as error:
        return str(error)
    sys.stdout.write("\n".join(lines) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
