"""Checked npz files: atomic to write, verified when read.

A file is an ordinary npz (`numpy.load(path, allow_pickle=False)` opens it), uncompressed, with one extra member
`header`: JSON as uint8, holding the format's version, whatever the writer wants to state, and the SHA-256 of every
other member. Files without a header (made by other tools) are read as well; zip's CRC-32 then guards each member.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datasets.errors import CorruptData, MissingData

FORMAT = "certprune-pack"
VERSION = 1

Arrays = dict[str, npt.NDArray[Any]]


def digest(array: npt.NDArray[Any]) -> str:
    """SHA-256 (hex) over dtype, shape and the bytes in C order."""
    data = np.ascontiguousarray(array)
    sha = hashlib.sha256(f"{data.dtype.str}{data.shape}".encode())
    if data.size:
        sha.update(data.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def write(path: str | Path, arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, Any] | None = None) -> None:
    """Write `arrays` and a JSON-able `header` to `path`, so that a reader sees the old file or the whole new one.

    The bytes go to a temporary file beside `path`, reach the disk (fsync) and are renamed onto it. An `OSError` (disk
    full, folder not writable) leaves nothing behind.
    """
    path = Path(path)
    if "header" in arrays:
        raise ValueError("'header' is the name of the checksum member; choose another name for the array")
    stated = dict(header or {})
    stated |= {"format": FORMAT, "version": VERSION, "sha256": {name: digest(array) for name, array in arrays.items()}}
    text = np.frombuffer(json.dumps(stated, sort_keys=True).encode(), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, header=text, **dict(arrays))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def members(path: str | Path) -> list[str]:
    """Names of the arrays in the npz at `path` (without the header). Raises as `read` does."""
    with _open(Path(path)) as archive:
        return [name for name in _names(archive) if name != "header"]


def read(path: str | Path, names: Iterable[str] | None = None) -> tuple[Arrays, dict[str, Any]]:
    """Read arrays (all, or just `names`) and the header ({} if the file has none).

    Raises `MissingData` without the file; `CorruptData` for a truncated file, a member that is missing or damaged, a
    checksum that does not fit, pickled objects, or a newer version of the format.
    """
    path = Path(path)
    with _open(path) as archive:
        present = _names(archive)
        header: dict[str, Any] = {}
        if "header" in present:
            try:
                header = json.loads(_member(archive, path, "header").tobytes())
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise CorruptData(
                    f"{path}: the header is no JSON ({error}); delete the file and make it again"
                ) from error
            if header.get("format") != FORMAT or header.get("version", 0) > VERSION:
                raise CorruptData(
                    f"{path}: format {header.get('format')!r} version {header.get('version')!r}, "
                    f"expected {FORMAT!r} up to version {VERSION}; it was made by another tool or a newer release"
                )
            present.remove("header")
        wanted = present if names is None else list(names)
        if absent := [name for name in wanted if name not in present]:
            raise CorruptData(f"{path}: lacks {', '.join(absent)}; it holds {', '.join(sorted(present)) or 'nothing'}")
        arrays = {name: _member(archive, path, name) for name in wanted}
    sums = header.get("sha256", {})
    for name, array in arrays.items():
        if header and digest(array) != sums.get(name):
            raise CorruptData(
                f"{path}: the SHA-256 of {name!r} is not the one written with it; "
                "the file was damaged or edited, delete it and make it again"
            )
    return arrays, header


def cached(
    path: Path, build: Callable[[], tuple[Arrays, dict[str, Any]]], names: Iterable[str] | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """`read(path, names)` if that file is there and sound, else `build()`, kept at `path` for the next time.

    A cache is never the only copy: a damaged file is reported with a warning and rebuilt, and a folder that cannot be
    written costs a warning, not the data.
    """
    names = None if names is None else list(names)
    if path.exists():
        try:
            return read(path, names)
        except CorruptData as error:
            warnings.warn(f"the cache is rebuilt: {error}", RuntimeWarning, stacklevel=2)
    arrays, header = build()
    try:
        write(path, arrays, header)
    except OSError as error:
        warnings.warn(f"not cached, {path}: {error}; choose another cache folder", RuntimeWarning, stacklevel=2)
    return {name: arrays[name] for name in (arrays if names is None else names)}, header


def signature(root: Path, files: Iterable[Path]) -> str:
    """12 hex digits that change when `root` moves or any of `files` changes in name, size or modification time."""
    sha = hashlib.sha256(str(root.resolve()).encode())
    for file in sorted(files):
        stat = file.stat()
        sha.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:12]


def _open(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise MissingData(f"{path}: no such file")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CorruptData(f"{path}: truncated or not an npz file ({error}); fetch or make it again") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> npt.NDArray[Any]:
    try:
        with archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # reading to the end is also what makes zipfile compare the CRC
                raise ValueError("bytes after the array")
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise CorruptData(f"{path}: array {name!r} cannot be read ({error}); fetch or make the file again") from error
    return array
