"""A network on record as a benchmark for any verifier: ONNX, VNN-LIB properties, and the verdicts on record.

``python -m runs.export RECORD_FOLDER`` writes, under ``RECORD_FOLDER/export`` or ``--out``, the network without its
pruned channels (``network.onnx``, checked against onnxruntime), a property for each of the first test images under the
radius it was certified at, ``instances.csv``, and ``known_results.csv`` with the verdicts on record. ``--verify`` then
runs ``runs.verify`` on the folder: it exits with 1 when a verdict contradicts the record. ``--timeout`` limits both.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.cell import Cell, Perturb, from_dict, recorded_by_state
from runs.store import DONE, Record, Slot, StoreError, read_record, write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

OK, FAILED, USAGE = 0, 1, 2
IMAGES = 10
_CONSENSUS = {"holds": "unsat", "violated": "sat"}


@dataclass(frozen=True)
class Ticket:
    """What a folder of a cell holds: its record, and which of its states is meant (None where it has but one)."""

    folder: Path
    record: Record
    cell: Cell
    state: int | None

    def verdicts(self, perturbation: Perturb) -> list[str]:
        """The status of each image on record, in order."""
        slot = Slot(self.cell, self.folder)
        rows = [
            row for row in slot.examples()
            if "event" not in row and row["perturbation"] == perturbation.label and row.get("state") == self.state
        ]  # fmt: skip
        return [row["status"] for row in sorted(rows, key=lambda row: row["index"])]


def find(folder: Path, state: int | None = None) -> Ticket:
    """The finished record in a folder, and the state chosen on validation unless another is asked for.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the cell failed, or has no such state.
    """
    record = read_record(folder / "record.json")
    if record is None:
        raise FileNotFoundError(f"no record.json in {folder}; give a folder of a results folder, such as results/<key>")
    if record["status"] != DONE:
        raise ValueError(f"the cell in {folder} failed ({record['error']['message']}); run it again first")
    cell = from_dict(record["cell"])
    if not recorded_by_state(cell.pruning):
        if state is not None:
            raise ValueError(f"{cell.label} has one network only: leave --state out")
        return Ticket(folder, record, cell, None)
    count = len(record["states"])
    index = record["chosen"] if state is None else state
    if not 0 <= index < count:
        raise ValueError(f"{cell.label} has the states 0 to {count - 1}, got {index}")
    return Ticket(folder, record, cell, index)


def network(ticket: Ticket, image: Tensor) -> nn.Module:
    """The network without the channels that a structured mask prunes. ``image``: one input (1, C, H, W).

    Raises:
        FileNotFoundError, models.CheckpointError, methods.masks.MaskError: files missing or damaged.
    """
    import models
    from methods import masks
    from runs import nrs_states

    if ticket.state is not None:
        model, mask = nrs_states.load(ticket.folder, ticket.state)
    else:
        slot = Slot(ticket.cell, ticket.folder)
        model = models.load(slot.model_path)
        mask = masks.load(slot.mask_path, model)
    return masks.remove(model, mask, image).eval() if mask.structured else model


def prop(image: Tensor, label: int, outputs: int, eps: float, what: str) -> str:
    """VNN-LIB of "every image within ``eps`` of this one (C, H, W), in [0, 1], is given ``label``"."""
    values = image.double().flatten().tolist()
    lines = [f"; {what}", *(f"(declare-const X_{i} Real)" for i in range(len(values)))]
    lines += [f"(declare-const Y_{k} Real)" for k in range(outputs)]
    for i, value in enumerate(values):
        low, high = max(0.0, value - eps), min(1.0, value + eps)
        lines += [f"(assert (>= X_{i} {low:.17f}))", f"(assert (<= X_{i} {high:.17f}))"]
    unsafe = " ".join(f"(and (>= Y_{k} Y_{label}))" for k in range(outputs) if k != label)
    return "\n".join([*lines, f"(assert (or {unsafe}))"]) + "\n"


def write(ticket: Ticket, folder: Path, pack: Any, perturbation: Perturb, images: int, seconds: float) -> list[Path]:
    """Write network, properties and lists; returns their paths.

    Args:
        ticket: what to export.
        folder: where to.
        pack: the test images, of the record's data.
        perturbation: "linf", of a radius that the record has.
        images: the first so many.
        seconds: limit an image in ``instances.csv``.

    Raises:
        ValueError: not classes, another perturbation, or other images than those on record.
        runs.onnx.ImportFailure: onnxruntime disagrees with the network.
    """
    from runs import onnx

    if pack.task != "classification" or perturbation.kind != "linf":
        raise ValueError(
            f"only classes under linf become properties here, not {pack.task} under {perturbation.label}"
        )  # fmt: skip
    if pack.fingerprint != ticket.record["data"]["fingerprints"]["test"]:
        raise ValueError(f"the test images of {pack.name} are not those on record: the files have changed")
    x, y = pack.tensors(list(range(min(images, len(pack)))))
    known = ticket.verdicts(perturbation)
    written = [onnx.export(network(ticket, x[:1]), folder / "network.onnx", tuple(x.shape[1:]))]
    rows, results = [], []
    for i, (image, label) in enumerate(zip(x, y.tolist())):
        path = folder / f"image-{i:04d}.vnnlib"
        what = (
            f"{ticket.cell.label}: test image {i} is class {label} ({pack.classes[label]}) under {perturbation.label}"
        )
        write_atomic(path, prop(image, label, pack.num_outputs, perturbation.magnitude, what).encode())
        written.append(path)
        rows.append(("network.onnx", path.name, f"{seconds:g}"))
        if i < len(known):
            results.append(("network.onnx", path.name, _CONSENSUS.get(known[i], "unknown")))
    for name, content in (("instances.csv", rows), ("known_results.csv", [("onnx", "vnnlib", "consensus"), *results])):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(content)
        write_atomic(folder / name, text.getvalue().encode())
        written.append(folder / name)
    about = {"cell": ticket.cell.to_dict(), "state": ticket.state, "perturbation": perturbation.label, **_size(ticket)}
    write_atomic(folder / "about.json", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
    return [*written, folder / "about.json"]


def _size(ticket: Ticket) -> Mapping[str, Any]:
    source = ticket.record if ticket.state is None else ticket.record["states"][ticket.state]
    return {"size": source["size"], "mask": source["mask"]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m runs.export",
        description="Write a network on record as ONNX with VNN-LIB properties of its first test images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("folder", type=Path, metavar="RECORD_FOLDER", help="a cell's folder, such as results/<key>")
    p.add_argument("--state", type=int, metavar="K", help="of a run with several states; the one chosen on validation")
    p.add_argument("--perturbation", metavar="linf:SIZE", help="the radius; the record's first if not given")
    p.add_argument("--images", type=int, default=IMAGES, metavar="N", help="the first so many test images")
    p.add_argument("--out", type=Path, metavar="DIR", help="where to; RECORD_FOLDER/export if not given")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie; $CERTPRUNE_DATA if not given")
    p.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds an image")
    p.add_argument("--verify", action="store_true", help="verify the files with runs.verify, against the record")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 when verifying back contradicts the record, or 2 for bad input."""
    args = parser().parse_args(arguments)
    try:
        if args.images < 1 or not args.timeout > 0:
            raise ValueError(f"--images and --timeout must be above 0, got {args.images} and {args.timeout:g}")
        ticket = find(args.folder, args.state)
        perturbation = Perturb.parse(args.perturbation) if args.perturbation else ticket.cell.perturbations[0]
        written = write(
            ticket, args.out or args.folder / "export", _pack(ticket.cell, args.data_dir), perturbation, args.images,
            args.timeout,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    where = written[0].parent
    print(f"wrote {len(written)} files under {where}")
    if not args.verify:
        return OK
    from runs import verify

    return verify.main(["--instances", str(where / "instances.csv"), "--results", str(where / "verified")])


def _pack(cell: Cell, root: Path | None) -> Any:
    from runs.execute import test_images
    from runs.packages import ours

    return ours("datasets").load(cell.data.name, root, "test", limit=test_images(cell), **cell.data.options)


if __name__ == "__main__":
    sys.exit(main())
