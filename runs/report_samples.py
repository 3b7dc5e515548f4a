"""The first test images of each leaderboard: what is proved of them, and where in the perturbation they fare worst.

Verdicts come from ``examples.jsonl`` beside a record. Where the data set can be had, its images are shown, and for
perturbations with parameters the member of the set on which the network does worst. Its parameter is on record for
keypoints; for classes it is looked for on a grid, with the network of the record.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.cell import Cell, Perturb, from_dict
from runs.leaderboard import Row, Table
from runs.nrs_records import unfold
from runs.packages import ours
from runs.store import DONE, Record, Store, read_lines

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 6
NETWORKS = 4
POINTS = 65
"""Of the grid over one parameter; a grid over two has as many in all, about."""

_AT_ONCE = 8


@dataclass(frozen=True)
class Sample:
    """What one network makes of one test image.

    ``wrong`` says that the unperturbed image is classified wrongly. ``at`` is the parameter (one number each) at which
    it does worst, ``picture`` the image there as PNG; None where the perturbation has no parameter or what is needed is
    not at hand.
    """

    verdict: str
    lower: float | None
    wrong: bool = False
    at: tuple[float, ...] | None = None
    picture: bytes | None = None


@dataclass(frozen=True)
class Strip:
    """The same test images under several networks of one table; ``originals`` is empty where they are not at hand."""

    table: Table
    indices: tuple[int, ...]
    originals: tuple[bytes, ...]
    truth: tuple[str, ...]
    networks: tuple[tuple[str, tuple[Sample, ...]], ...]
    note: str = ""


@dataclass
class Packs:
    """Test images of data sets, each looked for once."""

    data_dir: Path | None
    found: dict[str, Any]

    def get(self, cell: Cell, fingerprint: str) -> Any:
        """The test pack that a cell was certified on, or None where it is not at hand."""
        if fingerprint not in self.found:
            self.found[fingerprint] = self._load(cell, fingerprint)
        return self.found[fingerprint]

    def _load(self, cell: Cell, fingerprint: str) -> Any:
        from runs.execute import test_images

        try:
            data = cell.data
            pack = ours("datasets").load(data.name, self.data_dir, "test", limit=test_images(cell), **data.options)
        except (OSError, ValueError, RuntimeError):
            return None
        return pack if pack.fingerprint == fingerprint else None


def strips(
    tables: Sequence[Table], records: Iterable[Record], folder: Path, data_dir: Path | None = None
) -> list[Strip]:
    """The samples of every table of which verdicts on single images lie under ``folder``.

    Shown are the first images of the test set in its own order, under the dense network and the best others, each with
    its first seed.
    """
    found: dict[tuple[object, ...], list[tuple[Cell, Record]]] = {}
    for record in unfold(records):
        if record["status"] == DONE:
            cell = from_dict(record["cell"])
            for perturbation in cell.perturbations:
                found.setdefault(_place(cell, perturbation), []).append((cell, record))
    packs, store = Packs(data_dir, {}), Store(folder)
    made = (_strip(table, found, store, packs) for table in tables)
    return [strip for strip in made if strip is not None]


def _place(cell: Cell, perturbation: Perturb) -> tuple[object, ...]:
    where = (cell.data.label, cell.network.label, perturbation, cell.verifier)
    return (*where, cell.pruning.label, cell.pruning.ratio, cell.training.label)


def _chosen(table: Table) -> list[Row]:
    """The first dense row and the best others, in the order of the table."""
    done = [row for row in table.rows if row.verified is not None]
    best = sorted(done, key=lambda row: (row.method != "dense", -(row.verified.mean if row.verified else 0.0)))
    dense = [row for row in best if row.method == "dense"][:1]
    rest = [row for row in best if row.method != "dense"]
    kept = [*dense, *rest][:NETWORKS]
    return [row for row in done if any(row is one for one in kept)]


def _strip(
    table: Table, found: Mapping[tuple[object, ...], Sequence[tuple[Cell, Record]]], store: Store, packs: Packs
) -> Strip | None:
    networks: list[tuple[str, tuple[Sample, ...]]] = []
    pack: Any = None
    indices: tuple[int, ...] = ()
    for row in _chosen(table):
        where = (table.data, table.network, table.perturbation, table.verifier)
        candidates = found.get((*where, row.method, row.ratio, row.training), ())
        if not candidates:
            continue
        cell, record = min(candidates, key=lambda pair: pair[0].seed)
        rows = _verdicts(cell, record, table.perturbation.label, store)
        if not rows:
            continue
        pack = packs.get(cell, record["data"]["fingerprints"]["test"])
        indices = tuple(int(one["index"]) for one in rows)
        label = f"{row.method} {row.ratio:g} · {row.training} · seed {cell.seed}"
        networks.append((label, _samples(cell, record, table, rows, store, pack)))
    if not networks:
        return None
    if pack is None:
        note = "The test images are not at hand here (--data-dir), so that verdicts stand alone."
        return Strip(table, indices, (), (), tuple(networks), note)
    import torch

    x, y = pack.tensors(torch.tensor(indices))
    truth = tuple(pack.classes[int(label)] for label in y) if pack.task == "classification" else ()
    return Strip(table, indices, tuple(map(png, x)), truth, tuple(networks))


def _state(cell: Cell, record: Record) -> int | None:
    """Which state of its run an unfolded record is about; None where a run has one network."""
    if "states" not in record:
        return None
    return next(int(state["index"]) for state in record["states"] if state["removed"] == cell.pruning.ratio)


def _verdicts(cell: Cell, record: Record, label: str, store: Store) -> list[dict[str, Any]]:
    """The rows of the first images, in order; none where the file is not there or belongs to other images."""
    rows, _ = read_lines(store.root / record["key"] / "examples.jsonl")
    state = _state(cell, record)
    own = [r for r in rows if r.get("perturbation") == label and r.get("state") == state and "event" not in r]
    wanted = record["data"]["fingerprints"]["test"]
    own = [row for row in own if row.get("data", wanted) == wanted and "index" in row]
    return sorted(own, key=lambda row: int(row["index"]))[:IMAGES]


def _samples(
    cell: Cell, record: Record, table: Table, rows: Sequence[Mapping[str, Any]], store: Store, pack: Any
) -> tuple[Sample, ...]:
    classes = table.task == "classification"
    plain = [
        Sample(str(row.get("status", "–")), row.get("lower"), classes and row.get("clean") == 0.0) for row in rows
    ]  # fmt: skip
    if pack is None:
        return tuple(plain)
    import torch

    from runs import measure

    try:
        p = measure.perturbation(table.perturbation)
    except ValueError:  # a law of random edits, which has no member that is the worst
        return tuple(plain)
    x, y = pack.tensors(torch.tensor([int(row["index"]) for row in rows]))
    if all("deviation_at" in row for row in rows):
        at = torch.tensor([row["deviation_at"] for row in rows], dtype=x.dtype)
        images = p.apply(x, at[:, 0] if at.shape[1] == 1 else at)
    else:
        labels = y if pack.task == "classification" else None
        worst = _search(cell, record, p, x, labels, store)
        if worst is None:
            return tuple(plain)
        at, images = worst
    return tuple(replace(one, at=tuple(map(float, t)), picture=png(image)) for one, t, image in zip(plain, at, images))


def _search(
    cell: Cell, record: Record, p: Any, x: Tensor, y: Tensor | None, store: Store
) -> tuple[Tensor, Tensor] | None:
    """The point (N, k) of a grid over the parameters with the smallest margin, and the images (N, C, H, W) there.

    None where the perturbation has no parameters or the network is not at hand.
    """
    import torch

    import models
    from certify.curves import Path as Curve
    from certify.perturbations import AffineFamily
    from runs import nrs_states
    from runs.reattack import Question, margins_at

    if not isinstance(p, AffineFamily | Curve):
        return None
    folder, state = store.root / record["key"], _state(cell, record)
    try:
        model = (
            models.load(folder / "model.safetensors") if state is None else nrs_states.load(folder, state)[0]
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError):
        return None
    with torch.no_grad():
        question = Question(model, p, x, model(x), y, cell.verifier.delta)
    low, high = p.limits(x)
    k = low.shape[1]
    points = max(3, round(POINTS ** (1 / k)))
    unit = torch.cartesian_prod(*[torch.linspace(0, 1, points)] * k).reshape(-1, 1, k).to(x)
    grid = low + (high - low) * unit
    margins = torch.cat([margins_at(question, _members(p, x, part)) for part in grid.split(_AT_ONCE)])
    at = grid[margins.argmin(0), torch.arange(len(x))]
    return at, _members(p, x, at.unsqueeze(0))[0]


def _members(p: Any, x: Tensor, at: Tensor) -> Tensor:
    """Images (n, N, C, H, W) at parameters (n, N, k)."""
    images: Tensor = p.apply(x, at[..., 0] if at.shape[-1] == 1 else at)
    return images


def png(image: Tensor) -> bytes:
    """One image (C, H, W) in [0, 1] as PNG; the first channel of those that are neither grey nor RGB."""
    from PIL import Image

    shown = image if image.shape[0] == 3 else image[:1]
    pixels = (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(buffer, format="png")
    return buffer.getvalue()
