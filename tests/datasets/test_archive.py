from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datasets import archive
from datasets.errors import CorruptData, MissingData


@pytest.fixture
def arrays() -> archive.Arrays:
    rng = np.random.default_rng(1)
    return {
        "x": rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8),
        "y": rng.integers(0, 5, 50),
        "class_names": np.array(["one", "två", "three"]),
    }


def test_round_trip_is_exact_and_plain_numpy_reads_it(tmp_path: Path, arrays: archive.Arrays) -> None:
    path = tmp_path / "deeper" / "a.npz"
    archive.write(path, arrays, {"meta": {"mean": [0.5]}})
    found, header = archive.read(path)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    assert header["meta"] == {"mean": [0.5]}
    assert sorted(archive.members(path)) == sorted(arrays)
    with np.load(path, allow_pickle=False) as plain:
        assert np.array_equal(plain["x"], arrays["x"])
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, arrays: archive.Arrays) -> None:
    for name in ("a.npz", "b.npz"):
        archive.write(tmp_path / name, arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_byte_is_caught(tmp_path: Path, place: float) -> None:
    path = tmp_path / "a.npz"
    archive.write(path, {"x": np.random.default_rng(2).integers(0, 256, 20_000, dtype=np.uint8)})
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData, match=r"a\.npz"):
        archive.read(path)


def test_the_checksum_catches_an_edit_that_leaves_a_valid_zip(tmp_path: Path, arrays: archive.Arrays) -> None:
    path = tmp_path / "a.npz"
    archive.write(path, arrays)
    with np.load(path) as stored:
        edited = {name: stored[name].copy() for name in stored.files}
    edited["x"][3, 2, 1, 0] ^= 1
    np.savez(path, **edited)
    with pytest.raises(CorruptData, match="SHA-256 of 'x'"):
        archive.read(path)
    archive.read(path, ["y"])  # what was not touched is still good


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncation_is_caught(tmp_path: Path, arrays: archive.Arrays, keep: float, compressed: bool) -> None:
    path = tmp_path / "a.npz"
    if compressed:
        np.savez_compressed(path, **arrays)
    else:
        archive.write(path, arrays)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CorruptData, match="truncated or not an npz"):
        archive.read(path)


def test_damage_in_a_file_of_another_tool_is_caught_by_its_crc(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(3).integers(0, 256, 50_000, dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="'x' cannot be read"):
        archive.read(path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptData, match="allow_pickle"):
        archive.read(tmp_path / "a.npz")


def test_missing_file_member_and_newer_version(tmp_path: Path, arrays: archive.Arrays, monkeypatch) -> None:
    with pytest.raises(MissingData, match=r"nothing\.npz"):
        archive.read(tmp_path / "nothing.npz")
    path = tmp_path / "a.npz"
    archive.write(path, arrays)
    with pytest.raises(CorruptData, match="lacks z; it holds class_names, x, y"):
        archive.read(path, ["x", "z"])
    with pytest.raises(ValueError, match="'header' is the name"):
        archive.write(path, {"header": np.zeros(1)})
    monkeypatch.setattr(archive, "VERSION", 2)
    archive.write(path, arrays)
    monkeypatch.setattr(archive, "VERSION", 1)
    with pytest.raises(CorruptData, match="version 2, expected"):
        archive.read(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, arrays: archive.Arrays, monkeypatch) -> None:
    path = tmp_path / "a.npz"
    archive.write(path, arrays)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        archive.write(path, {"x": np.zeros(3)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_cached_builds_once_rebuilds_damage_and_survives_a_full_disk(tmp_path: Path, arrays, monkeypatch) -> None:
    path, built = tmp_path / "cache" / "a.npz", []

    def build() -> tuple[archive.Arrays, dict[str, object]]:
        built.append(1)
        return dict(arrays), {"meta": {"k": 1}}

    for _ in range(2):
        found, header = archive.cached(path, build, ["y"])
        assert list(found) == ["y"]
        assert header["meta"] == {"k": 1}
    assert len(built) == 1
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="cache is rebuilt"):
        archive.cached(path, build)
    assert len(built) == 2
    assert zipfile.is_zipfile(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="not cached"):
        found, _ = archive.cached(tmp_path / "cache" / "b.npz", build)
    assert np.array_equal(found["x"], arrays["x"])


def test_signature_follows_names_sizes_and_times(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text("x")
    first = archive.signature(tmp_path, files)
    assert archive.signature(tmp_path, reversed(files)) == first
    os.utime(files[0], ns=(1, 1))
    second = archive.signature(tmp_path, files)
    files[1].write_text("longer")
    assert len({first, second, archive.signature(tmp_path, files), archive.signature(tmp_path, files[:1])}) == 4
