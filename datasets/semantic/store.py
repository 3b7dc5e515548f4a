"""Generated images on disk: made once, found again, checked, and exactly those pixels are used.

`<root>/<transform>/<split>/` holds `manifest.json` (the transform, in full), `shards.jsonl` (one line for each shard:
source image, stream, rows, checksum) and `shards/<name>.npz`. A shard holds consecutive draws of one image in one
stream: uint8 images and their deltas. Draw j of an image is a function of (stream, image, j) alone, so asking for more
draws extends what is there, killing a run loses at most the shard being written, and two processes may fill one store.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import archive
from datasets.errors import CorruptData, MissingData
from datasets.semantic.transform import SemanticTransform, fingerprint, make, make_each, quantise

VERSION = 1
ROWS = 256
"""Draws a shard; a constant of the layout."""


def image_hash(image: Tensor) -> str:
    """SHA-256 (hex) of an image (C, H, W) in [0, 1] as 8-bit pixels."""
    pixels = quantise(image).cpu().contiguous().numpy()
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def deltas(stream: int, image: str, count: int, first: int = 0) -> Tensor:
    """float32 (count,): strengths of draws first, first + 1, ... of the image with this hash, uniform on [0, 1).

    One fixed random sequence for each (stream, image), so that a longer request begins with the shorter one.
    """
    words = np.frombuffer(bytes.fromhex(image)[:16], dtype="<u4")
    rng = np.random.default_rng([stream, *(int(w) for w in words)])
    return torch.from_numpy(rng.random(first + count)[first:].astype(np.float32))


@dataclass(frozen=True)
class Shard:
    """One line of `shards.jsonl`: `rows` draws of an image from draw `first` on, and the checksum of both arrays."""

    file: str
    image: str
    index: int
    stream: int
    first: int
    rows: int
    sha256: str


class EditStore:
    """The images a transform makes, kept under `root`.

    Args:
        root: folder for all stores; this one's is `folder`.
        transform: what makes the images.
        split: a name for the source images ("train", "test").

    Raises CorruptData where the folder holds a manifest that cannot be read or is another transform's.
    """

    def __init__(self, root: str | Path, transform: SemanticTransform, split: str = "test") -> None:
        self.transform = transform
        self.fingerprint = fingerprint(transform)
        self.split = split
        self.folder = Path(root).expanduser() / self.fingerprint[:16] / split
        manifest = self.folder / "manifest.json"
        if manifest.is_file():
            self._check_manifest(manifest)
        else:
            stated = {"version": VERSION, "fingerprint": self.fingerprint, "split": split}
            _write_text(manifest, json.dumps({**stated, "transform": transform.describe()}, indent=1))
        self._shards = self._read_lines()

    def __len__(self) -> int:
        """Draws that are stored."""
        return sum(shard.rows for shard in self._shards.values())

    def take(self, image: Tensor, index: int, stream: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` draws of an image in a stream; what is not there yet is made and kept.

        Args:
            image: (C, H, W) float in [0, 1].
            index: its position in the transform's set.
            stream: any integer >= 0: a seed of independent draws.
            count: how many, at least 1.

        Returns:
            uint8 (count, C, H, W) and float32 (count,), the deltas.

        Raises:
            ValueError: bad arguments, or the transform failed its checks.
            CorruptData: a damaged shard was made again and came out different from what its checksum says.
        """
        if stream < 0 or count < 1:
            raise ValueError(f"stream must be >= 0 and count >= 1, got {stream} and {count}")
        source = image_hash(image)
        parts = [
            self._part(image, source, index, stream, first, min(ROWS, count - first)) for first in range(0, count, ROWS)
        ]
        pixels, strengths = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
        return torch.from_numpy(pixels), torch.from_numpy(strengths)

    def fill(self, images: Tensor, index: Sequence[int], stream: int) -> None:
        """Make and keep the first draw in a stream of every image that has none there, all of them together.

        Args:
            images: (B, C, H, W) float in [0, 1].
            index: their positions in the transform's set.
            stream: see `take`.

        Raises:
            ValueError: the transform failed its checks.
        """
        sources = [image_hash(image) for image in images]
        missing = {file: i for i, s in enumerate(sources) if (file := _file(s, stream, 0)) not in self._shards}
        if not missing:
            return
        rows = list(missing.values())
        strengths = torch.cat([deltas(stream, sources[i], 1) for i in rows])
        pixels = make_each(self.transform, images[rows], [index[i] for i in rows], strengths).cpu().numpy()
        for k, (file, i) in enumerate(missing.items()):
            one = slice(k, k + 1)
            self._keep(file, sources[i], index[i], stream, 0, pixels[one], strengths[one].numpy())

    def verify(self) -> int:
        """Read every shard and compare it with its checksum; returns how many draws are sound.

        Raises MissingData or CorruptData for the first shard that is not.
        """
        for shard in self._shards.values():
            self._load(shard)
        return len(self)

    def _part(self, image: Tensor, source: str, index: int, stream: int, first: int, rows: int) -> tuple[Any, Any]:
        file = _file(source, stream, first)
        known = self._shards.get(file)
        pixels, strengths = None, None
        if known is not None:
            try:
                pixels, strengths = self._load(known)
            except (CorruptData, MissingData) as error:
                warnings.warn(f"the shard is made again: {error}", RuntimeWarning, stacklevel=4)
                pixels, strengths = self._make(image, source, index, stream, first, known.rows)
                if _digest(pixels, strengths) != known.sha256:
                    raise CorruptData(
                        f"{self.folder / 'shards' / file}: damaged, and the images made in its place are not the ones "
                        "it held (another device or library version?); what was certified with it cannot be "
                        f"reproduced here. Delete {self.folder} to begin again"
                    ) from error
                self._keep(file, source, index, stream, first, pixels, strengths)
        have = 0 if pixels is None else len(pixels)
        if have < rows:
            more = self._make(image, source, index, stream, first + have, rows - have)
            if pixels is None or strengths is None:
                pixels, strengths = more
            else:
                pixels, strengths = np.concatenate([pixels, more[0]]), np.concatenate([strengths, more[1]])
            self._keep(file, source, index, stream, first, pixels, strengths)
        assert pixels is not None  # rows >= 1: read or made
        assert strengths is not None
        return pixels[:rows], strengths[:rows]

    def _make(self, image: Tensor, source: str, index: int, stream: int, first: int, rows: int) -> tuple[Any, Any]:
        strengths = deltas(stream, source, rows, first)
        return make(self.transform, image, index, strengths).cpu().numpy(), strengths.numpy()

    def _keep(self, file: str, source: str, index: int, stream: int, first: int, pixels: Any, strengths: Any) -> None:
        shard = Shard(file, source, index, stream, first, len(pixels), _digest(pixels, strengths))
        archive.write(self.folder / "shards" / file, {"images": pixels, "deltas": strengths}, vars(shard))
        # One write of one line: appends of several processes do not mix, and a torn last line is skipped when read.
        with (self.folder / "shards.jsonl").open("ab") as lines:
            lines.write(json.dumps(vars(shard)).encode() + b"\n")
        self._shards[file] = shard

    def _load(self, shard: Shard) -> tuple[Any, Any]:
        path = self.folder / "shards" / shard.file
        arrays, _ = archive.read(path, ("images", "deltas"))
        if _digest(arrays["images"], arrays["deltas"]) != shard.sha256:
            raise CorruptData(f"{path}: not the images that shards.jsonl lists for it")
        return arrays["images"], arrays["deltas"]

    def _check_manifest(self, path: Path) -> None:
        try:
            stated = json.loads(path.read_text())
            version, found = stated["version"], stated["fingerprint"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorruptData(
                f"{path}: not a manifest of generated images ({error!r}); delete {path.parent}"
            ) from error
        if version != VERSION or found != self.fingerprint:
            raise CorruptData(f"{path}: made by another version or transform; delete {path.parent} or use another root")

    def _read_lines(self) -> dict[str, Shard]:
        path = self.folder / "shards.jsonl"
        shards: dict[str, Shard] = {}
        if not path.is_file():
            return shards
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):  # a run was killed while it wrote: its line is dropped, its shard remade
            text = text[: text.rfind(b"\n") + 1]
            _write_text(path, text.decode())
        for number, line in enumerate(text.decode().splitlines(), 1):
            try:
                shard = Shard(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise CorruptData(
                    f"{path}, line {number}: not a shard's line ({error}); delete {self.folder}"
                ) from error
            shards[shard.file] = shard
        return shards


def _file(source: str, stream: int, first: int) -> str:
    return f"{source[:16]}-{stream:x}-{first}.npz"


def _digest(pixels: Any, strengths: Any) -> str:
    return hashlib.sha256((archive.digest(pixels) + archive.digest(strengths)).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
