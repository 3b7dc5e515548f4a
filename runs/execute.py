"""One cell end to end: load the data, make the network, train and prune it, certify it, and write down what came out.

Weights are selected on validation images only; the test images are touched by certification alone. Whatever is finished
when the process dies (training epochs, the trained network, verdicts of a batch) is taken up by the next run, and the
numbers are those of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from methods import masks
from runs import (
    car_edits,
    car_measure,
    car_sampling,
    certification,
    channels,
    configure,
    measure,
    nrs_records,
    nrs_states,
    nrs_warmup,
    pretrained,
)
from runs.cell import SCHEMA, Cell, Data, recorded_by_state
from runs.packages import ours
from runs.progress import Progress
from runs.sampled import beside
from runs.shifts import Shifted
from runs.store import DONE, Record, Slot, Store, file_sha256
from runs.suites import car


@dataclass(frozen=True)
class Packs:
    """The three splits of a data set, the test split cut to the images that are certified."""

    train: Any
    val: Any
    test: Any


@dataclass
class Library:
    """Data sets that this process has loaded; consecutive cells share them. Edits are generated on ``device``."""

    root: Path | None
    device: torch.device
    loaded: dict[tuple[Data, int | None], Packs] = field(default_factory=dict)

    def get(self, data: Data, images: int | None, tell: Callable[[int, int], None]) -> Packs:
        """Load a data set, or return it if this process has it.

        Raises:
            FileNotFoundError: the files are not there; the message says where they were looked for and how to get them.
            ValueError: damaged files, or settings that the set does not take.
        """
        key = (data, images)
        if key not in self.loaded:
            load = ours("datasets").load

            def split(name: str, limit: int | None) -> Any:
                return load(data.name, self.root, name, limit=limit, progress=tell, **data.options)

            self.loaded.clear()  # one data set at a time in memory
            train = split("train", data.limit)
            if data.edits is not None:
                train = car_edits.augmented(train, data.edits, data.edited, self.root, self.device)
            self.loaded[key] = Packs(train, split("val", data.val_limit), split("test", images))
        return self.loaded[key]


@dataclass(frozen=True)
class Execute:
    """Runs cells on one device. ``store`` is where networks trained by other cells may be found."""

    device: torch.device
    library: Library
    store: Store

    @classmethod
    def on(cls, device: str, *, threads: int | None, data_dir: Path | None, store: Store) -> Execute:
        """Resolve the device ("auto": CUDA where there is one) and set this process's thread count.

        Raises:
            ValueError: the device is unknown or not there.
        """
        torch.set_num_threads(threads or measure.available_cores())
        place = resolve_device(device)
        return cls(place, Library(data_dir, place), store)

    @staticmethod
    def factory(device: str, *, threads: int | None, data_dir: Path | None, store: Store) -> Callable[[], Execute]:
        """``on`` with its arguments, to be called in another process."""
        return functools.partial(Execute.on, device, threads=threads, data_dir=data_dir, store=store)

    def prepare(self, cells: Sequence[Cell], progress: Progress) -> None:
        """Load every data set once, so that what has to be rendered or unpacked is in the cache when processes start.

        A data set that cannot be had is left to its cells, which fail with the reason.
        """
        for cell in {(cell.data, test_images(cell)): cell for cell in cells}.values():

            def tell(done: int, total: int, cell: Cell = cell) -> None:
                progress.step(cell, "preparing the data", done, total)

            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self.library.get(cell.data, test_images(cell), tell)

    def __call__(self, cell: Cell, slot: Slot, progress: Progress) -> Record:
        started = time.perf_counter()

        def tell(done: int, total: int) -> None:
            progress.step(cell, "preparing the data", done, total)

        packs = self.library.get(cell.data, test_images(cell), tell)
        fingerprints = {name: getattr(packs, name).fingerprint for name in ("train", "val", "test")}
        trained = self._trained(cell, slot, packs, fingerprints, progress)
        if any(row["data"] != fingerprints["test"] for row in slot.examples()):
            slot.clear_examples()  # verdicts on other images than today's
        if recorded_by_state(cell.pruning):
            found = self._states(cell, slot, packs, trained, progress)
        else:
            found = self._network(cell, slot, packs, progress)
        return {
            "schema": SCHEMA,
            "key": cell.key,
            "training_key": cell.training_key,
            "status": DONE,
            "cell": cell.to_dict(),
            "data": {
                "task": packs.test.task,
                "name": packs.test.name,
                "fingerprints": fingerprints,
                "images": {"train": len(packs.train), "val": len(packs.val), "test": len(packs.test)},
                "split_rule": packs.test.meta.get("split_rule"),
            },
            "training": trained["training"],
            **found,
            "environment": measure.environment(self.device),
            "timing": {"seconds": time.perf_counter() - started},
        }

    def _network(self, cell: Cell, slot: Slot, packs: Packs, progress: Progress) -> dict[str, Any]:
        """Certify the network of this folder; what the record says of it."""
        model = models.load(slot.model_path, device=self.device)
        mask = masks.load(slot.mask_path, model)
        test = packs.test.tensors(device=self.device)
        x, y = (part[: cell.verifier.images] for part in test)
        sampled = cell.verifier.method == car.METHOD
        root = self.library.root
        if sampled and not all(
            car_sampling.current(slot.examples(), p, packs.test, root, self.device) for p in cell.perturbations
        ):
            slot.clear_examples()
        results = []
        for position, perturbation in enumerate(cell.perturbations):
            result = certification.certify_one(
                cell, perturbation, model, x, y, packs.test, slot, position, progress, root=root
            )
            if not sampled:
                p = measure.perturbation(perturbation)
                result |= beside(cell.verifier, packs.test.task, p, model, x, y)
            results.append(result)
        more: dict[str, Any] = {}
        if sampled:
            points = car_sampling.sampling(cell.verifier).landscape
            more = dict(car_measure.found(model, mask, test, packs.val.tensors(device=self.device), points))
        return {
            "network": model.recipe.to_dict(),
            "size": measure.sizes(model, mask, x[:1]),
            "mask": {"structured": mask.structured, "density": mask.density, "layers": mask.layer_density},
            "results": results,
            **more,
            **self._channels(cell, model, mask, packs),
        }

    def _states(
        self, cell: Cell, slot: Slot, packs: Packs, trained: dict[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Certify every state of this folder's run; the record's own numbers are those of the state chosen."""
        test, val = (pack.tensors(device=self.device) for pack in (packs.test, packs.val))
        x, y = (part[: cell.verifier.images] for part in test)
        found: list[dict[str, Any]] = []
        recipe: dict[str, Any] = {}
        for line in trained["states"]:
            index = line["index"]
            model, mask = nrs_states.load(slot.path, index, self.device)
            recipe = model.recipe.to_dict()
            small = nrs_states.without_pruned(model, mask, x, measure.perturbation(cell.perturbations[0]))
            results: list[dict[str, Any]] = []
            for perturbation in cell.perturbations:
                result = certification.certify_one(
                    cell, perturbation, small.network, x, y, packs.test, slot,
                    index * len(cell.perturbations) + len(results), progress, index, len(trained["states"]),
                )  # fmt: skip
                tag = {"perturbation": perturbation.label, "state": index, "event": "measured"}
                rows = [row for row in slot.examples() if row.items() >= tag.items()]
                if not rows:
                    p = measure.perturbation(perturbation)
                    measured = nrs_states.measured(cell, model, small.network, p, test, val)
                    rows = [{**tag, "data": packs.test.fingerprint, "measured": measured}]
                    slot.append_examples(rows)
                results.append(result | rows[0]["measured"])
            found.append(
                {**line, **nrs_states.summary(model, mask, x[:1]), "removal": small.facts, "results": results}
                | {"constant": results[0]["constant"]}
            )
        index = nrs_records.chosen(found)
        parts = {name: found[index][name] for name in ("size", "mask", "results")}
        return {"network": recipe, **parts, "states": found, "chosen": index}

    def _channels(self, cell: Cell, model: nn.Module, mask: masks.Mask, packs: Packs) -> dict[str, Any]:
        """What the USN metrics say of each channel of the finished network, on validation images."""
        if cell.pruning.method != "usn":
            return {}
        return {"channels": channels.describe(configure.build_config(cell), model, mask, packs.val, self.device)}

    def _trained(
        self, cell: Cell, slot: Slot, packs: Packs, fingerprints: dict[str, str], progress: Progress
    ) -> dict[str, Any]:
        """Train unless this folder, or another cell's, holds exactly this network; returns the line that says so."""
        found = slot.trained()
        data = {name: fingerprints[name] for name in ("train", "val")}
        data |= pretrained.stated(cell.network, self.library.root)
        if found is not None and found["fingerprints"] == data:
            return found
        slot.clear_examples()
        twin = self.store.same_training(cell)
        if twin is not None and (line := twin.trained()) is not None and line["fingerprints"] == data:
            for name in (*line["files"], "history.jsonl"):
                shutil.copyfile(twin.path / name, slot.path / name)
            if (copied := slot.trained()) is not None:
                return copied
        return self._train(cell, slot, packs, data, progress)

    def _train(
        self, cell: Cell, slot: Slot, packs: Packs, fingerprints: dict[str, str], progress: Progress
    ) -> dict[str, Any]:
        by_state = recorded_by_state(cell.pruning)
        given = pretrained.source(cell.network, self.library.root)
        network: nn.Module = models.create(
            cell.network.name,
            num_outputs=packs.train.num_outputs,
            in_channels=packs.train.in_channels,
            image_size=packs.train.image_size,
            width=cell.network.width,
            pretrained=given,
            head=head(cell, packs.train.task),
            mean=None if given else packs.train.mean,  # published weights expect images as they were trained on
            std=None if given else packs.train.std,
            seed=cell.seed,
        )
        network = nrs_warmup.prepare(network, cell.training.objective, cell.seed).to(self.device)
        method = nrs_states.method(cell) if by_state else configure.build_method(cell, network, packs.train)
        total = configure.total_epochs(method.config)
        epochs_done = 0

        def tell(model: nn.Module, record: object) -> None:
            nonlocal epochs_done
            epochs_done += 1
            progress.step(cell, "training", epochs_done, total)

        augment = packs.train.augmentation if cell.data.augment else None
        batches: Any
        if "semantic" in packs.train.meta:
            batches = car_edits.paired_batches(
                packs.train, cell.training.batch_size, device=self.device, seed=cell.seed, augment=augment
            )
        else:
            batches = packs.train.batches(cell.training.batch_size, device=self.device, seed=cell.seed, augment=augment)
        if cell.data.augment and packs.train.task == "keypoints":
            batches = Shifted(batches, cell.seed)
        val = packs.val.batches(256, device=self.device, shuffle=False)
        folder = slot.path / "training"
        progress.step(cell, "training", 0, total)
        names: list[str] = []
        states: list[dict[str, Any]] = []
        with measure.Peak(self.device) as peak:
            if by_state:
                for outcome in nrs_states.states(
                    method, network, batches, val, cell.seed, self.device, folder, (tell,)
                ):  # fmt: skip
                    names += nrs_states.save(outcome, len(states), slot.path)
                    states.append(nrs_states.described(outcome, len(states), nrs_states.removed(method, len(states))))
            else:
                outcome = method.fit(
                    network,
                    batches,
                    val=val,
                    seed=cell.seed,
                    device=self.device,
                    checkpoint=folder,
                    callbacks=(tell,),
                )
                models.save(nrs_warmup.fold(outcome.model), slot.model_path)
                masks.save(outcome.mask, slot.mask_path)
                names += [slot.model_path.name, slot.model_path.with_suffix(".json").name, slot.mask_path.name]
        selected = outcome.history.selected()
        line: dict[str, Any] = {
            "event": "trained",
            "files": {name: file_sha256(slot.path / name) for name in names},
            "fingerprints": fingerprints,
            "training": {
                "epochs": outcome.history.epochs,
                "phases": list(outcome.history.phases),
                "validation": dict(selected.validation) if selected else {},
                "timing": {"seconds": outcome.history.seconds, "peak_mb": peak.mb},
                **({"channel_ratio": method.config.ratio} if configure.match(cell) else {}),
                **remarks(outcome),
            },
            **({"states": states} if by_state else {}),
        }
        slot.write_history([*outcome.history.to_dicts(), line])
        shutil.rmtree(folder, ignore_errors=True)
        return line


def resolve_device(name: str) -> torch.device:
    """``auto`` or a torch device name, checked to be there.

    Raises:
        ValueError: not a device name, or no such device in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def head(cell: Cell, task: str) -> str | None:
    """The head of the network: as the cell says, else linear pixel coordinates for keypoints."""
    return cell.network.head or ("keypoints" if task == "keypoints" else None)


def test_images(cell: Cell) -> int | None:
    """How many test images a cell needs: those it certifies, more where accuracy is measured on more; None for all."""
    if cell.verifier.method == car.METHOD:
        return car_sampling.test_images(cell.verifier)
    return nrs_states.test_images(cell.verifier) if recorded_by_state(cell.pruning) else cell.verifier.images


def remarks(outcome: Any) -> dict[str, Any]:
    """What a method says of its own outcome: whether the network predicts a constant, and what was changed."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in ("collapsed", "notes", "ratio", "before", "after", "density_all")
        if (value := getattr(outcome, name, None)) is not None
    }
