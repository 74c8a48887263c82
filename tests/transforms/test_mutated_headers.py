# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Headers and files damaged at random: a volume or a `SeriesError`, nothing else, in little memory and without a name.

Tags are deleted, emptied, filled with foreign bytes under any VR and swapped between slices; files are cut, overwritten
in places, exchanged and declared to be of another transfer syntax.
"""

from __future__ import annotations

import resource
import struct
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from pydicom.dataset import Dataset
from transforms import LoadSeries, SeriesError

from tests.transforms.ct_factory import PRIVATE, ct_slice

SLICES = 4
LONG = ("OB", "OW", "SQ", "UN")  # VRs whose length has 32 bits in explicit VR little endian
Elements = dict[bytes, tuple[str, bytes]]  # tag as it is in a file -> VR, value


def elements_of(ds: Dataset) -> Elements:
    """What a file of this flat dataset holds after the preamble, parsed here and not by what is tested."""
    buffer, found = BytesIO(), {}
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    data, at = buffer.getvalue(), 132
    while at < len(data):
        tag, vr = data[at : at + 4], data[at + 4 : at + 6].decode()
        header = 12 if vr in LONG else 8
        (length,) = struct.unpack_from("<I" if vr in LONG else "<H", data, at + header - (4 if vr in LONG else 2))
        found[tag] = vr, data[at + header : at + header + length]
        at += header + length
    return found


def file_of(elements: Elements) -> bytes:
    """The other way round, whatever the elements hold."""
    parts = [bytes(128), b"DICM"]
    for tag, (vr, value) in elements.items():
        value = value + b"\0" * (len(value) % 2)
        length = struct.pack("<xxI", len(value)) if vr in LONG else struct.pack("<H", len(value))
        parts += [tag, vr.encode(), length, value]
    return b"".join(parts)


BASE = [elements_of(ct_slice(k, size=16)) for k in range(SLICES)]
TAGS = list(BASE[0])
SYNTAX = b"\x02\x00\x10\x00"
VRS = ["same", "US", "DS", "IS", "UI", "SQ", "OB", "OW", "UN", "LO", "FD", "AT", "CS", "PN", "ZZ"]
SYNTAXES = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5", "1.2.3", "",
            "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90",
            "1.2.840.10008.1.2.4.100"]  # fmt: skip
ODD_VALUES = [b"", b"0", b"-1", b"1e308", b"NaN", b"inf", b"9" * 40, b"1\\2", b"\\\\", b"abc", b"\xff" * 16, b"\0" * 8,
              b"1.2.3", b"LOCALIZER", b"RGB", b"\xe4\xf6", b"0.0001", b"16384"]  # fmt: skip
MAX_KIBIBYTES = 2**18  # that the process may grow by; the series holds 2 kB

which = st.one_of(st.none(), st.integers(0, SLICES - 1))
tags = st.sampled_from(TAGS)
numbers = st.one_of(st.integers(0, 2**16 - 1), st.sampled_from([0, 1, 2, 8, 12, 4096, 65535]))
values = st.one_of(st.sampled_from(ODD_VALUES), st.binary(max_size=24), numbers.map(lambda n: struct.pack("<H", n)))
header_mutations = st.one_of(
    st.tuples(st.just("delete"), which, tags),
    st.tuples(st.just("value"), which, tags, st.sampled_from(VRS), values),
    st.tuples(st.just("syntax"), which, st.sampled_from(SYNTAXES)),
    st.tuples(st.just("swap"), st.integers(0, SLICES - 1), st.integers(0, SLICES - 1), tags),
)
file_mutations = st.one_of(
    st.tuples(st.just("cut"), which, st.floats(0, 1)),
    st.tuples(st.just("overwrite"), which, st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("exchange"), st.integers(0, SLICES - 1), st.integers(0, SLICES - 1)),
)


def change_header(series: list[Elements], kind: str, where: int | None, *how: object) -> None:
    if kind == "swap":
        other, tag = how
        series[where][tag], series[other][tag] = (series[k].get(tag, BASE[k][tag]) for k in (other, where))
        return
    for elements in series if where is None else [series[where]]:
        if kind == "delete":
            elements.pop(how[0], None)
        elif kind == "syntax":
            elements[SYNTAX] = "UI", how[0].encode()
        else:
            tag, vr, value = how
            elements[tag] = (BASE[0][tag][0] if vr == "same" else vr), value


def change_file(files: list[bytes], kind: str, where: int | None, *how: object) -> None:
    if kind == "exchange":
        files[where] = files[how[0]]
        return
    for k in range(SLICES) if where is None else [where]:
        at = int(how[0] * len(files[k]))
        rest = b"" if kind == "cut" else how[1] + files[k][at + len(how[1]) :]
        files[k] = files[k][:at] + rest


def read(folder: str, resample: bool) -> tuple[MetaTensor | None, str]:
    """The volume, or why there is none."""
    try:
        return LoadSeries(resample=resample)(folder), ""
    except SeriesError as error:
        return None, str(error)


@settings(
    deadline=None,
    max_examples=25,
    database=None,
    phases=[Phase.generate],  # shrinking would take longer than the test
    suppress_health_check=list(HealthCheck),
)
@given(
    headers=st.lists(header_mutations, max_size=3), files=st.lists(file_mutations, max_size=2), resample=st.booleans()
)
def check_one(headers: list[tuple], files: list[tuple], resample: bool) -> None:
    series = [dict(elements) for elements in BASE]
    for mutation in headers:
        change_header(series, *mutation)
    contents = [file_of(elements) for elements in series]
    for mutation in files:
        change_file(contents, *mutation)
    with TemporaryDirectory() as folder:
        for k, content in enumerate(contents):
            (Path(folder) / f"{k}.dcm").write_bytes(content)
        volume, reason = read(folder, resample)
        if volume is None:
            assert folder in reason
            assert not any(secret in reason for secret in PRIVATE)
        else:
            assert volume.ndim == 4
            assert volume.numel() > 0
            assert np.isfinite(volume.affine.numpy()).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rounds", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_mutated_series_are_read_or_refused(rounds: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(rounds):
        seed(number)(check_one)()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_KIBIBYTES


def test_the_unchanged_series_is_read(tmp_path: Path) -> None:
    """So that refusals above are for the mutations."""
    for k, elements in enumerate(BASE):
        (tmp_path / f"{k}.dcm").write_bytes(file_of(elements))
    assert LoadSeries()(tmp_path).shape == (1, 16, 16, SLICES)
