"""Train, accept and show generators: ``python -m datasets.semantic train | accept | grid``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets.packs import Pack


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m datasets.semantic", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a DiffAE on a data set's training images, then accept it")
    accept = commands.add_parser("accept", help="judge a trained DiffAE on validation images")
    grid = commands.add_parser("grid", help="draw edits for delta = 0 ... 1 beside the photometric transforms")
    for command in (train, accept, grid):
        command.add_argument("--data", default="flowers102", help="data set, RGB (default flowers102)")
        command.add_argument("--data-dir", default=None, help="folder of the data ($CERTPRUNE_DATA)")
        command.add_argument("--image-size", type=int, default=None, help="pixels a side")
        command.add_argument("--device", default="cpu")
        command.add_argument("--model", required=command is not grid, help="path of the DiffAE, without suffix")
        command.add_argument("--limit", type=int, default=None, help="images to load")
    train.add_argument("--preset", choices=("cpu", "gpu"), default="cpu", help="size of the network and of the run")
    train.add_argument("--steps", type=int, default=None, help="optimiser steps instead of the preset's")
    train.add_argument("--seed", type=int, default=0)
    for command in (train, accept):
        command.add_argument("--attribute", default="warmth", help="what the edit raises (a measure)")
        command.add_argument("--change", type=float, default=0.8, help="wanted mean change at delta = 1")
    grid.add_argument("--out", required=True, help="PNG to write")
    grid.add_argument("--images", type=int, default=4)
    grid.add_argument("--zoom", type=int, default=1)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 1 for a generator that is refused and 2 for bad input."""
    arguments = parser().parse_args(argv)
    from datasets import semantic

    try:
        return {"train": _train, "accept": _accept, "grid": _grid}[arguments.command](arguments)
    except semantic.NotAccepted as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2


def _load(arguments: argparse.Namespace, split: str) -> Pack:
    import datasets

    return datasets.load(
        arguments.data,
        root=arguments.data_dir,
        split=split,
        limit=arguments.limit,
        image_size=arguments.image_size,
        progress=lambda done, total: print(f"\r{done}/{total} images", end="", file=sys.stderr, flush=True),
    )


def _train(arguments: argparse.Namespace) -> int:
    from datasets.semantic import presets, training

    pack = _load(arguments, "train")
    config, settings = presets.PRESETS[arguments.preset](pack.image_size, (arguments.attribute,), arguments.steps)
    model = training.train(
        pack,
        config,
        settings,
        seed=arguments.seed,
        device=arguments.device,
        progress=lambda step, steps, loss: print(
            f"\r{step}/{steps} loss {loss:.4f}", end="", file=sys.stderr, flush=True
        ),
    )
    model.save(arguments.model)
    return _accept(arguments)


def _accept(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from datasets import semantic

    others = {k: v for k, v in semantic.Criteria(attribute="").others.items() if k != arguments.attribute}
    criteria = semantic.Criteria(arguments.attribute, arguments.change, others=others)
    model = semantic.load(arguments.model, device=arguments.device)
    pack = _load(arguments, "val")
    print("\njudging the edits: minutes on a CPU, more of them than training takes", file=sys.stderr)
    report = semantic.accept(model, pack, criteria)
    model.save(arguments.model)
    print(json.dumps(asdict(report), indent=1))
    return 0


def _grid(arguments: argparse.Namespace) -> int:
    from datasets import semantic

    pack = _load(arguments, "test")
    edits: list[semantic.SemanticTransform] = []
    if arguments.model:
        edits.append(semantic.DiffAEEdit(semantic.load(arguments.model, device=arguments.device)))
    if "family" in pack.meta:
        edits += [semantic.SceneEdit(pack, attribute) for attribute in pack.meta["attributes"]]
    edits += semantic.standard()
    numbers = semantic.draw_grid(arguments.out, pack, edits, indices=range(arguments.images), zoom=arguments.zoom)
    print(json.dumps(numbers, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
