"""Whole cells on real digits: a second each, with the real packages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import certify
import models
from methods import masks
from runs import certification, compare, configure, execute, measure
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.engine import SerialEngine
from runs.packages import ROOT
from runs.progress import Silent
from runs.store import Record, Slot, Store
from tests.runs.handmade import make_cell

BOTH = (Perturb("linf", 0.02), Perturb("brightness", 0.1))


def digits_cell(method: str = "magnitude", ratio: float = 0.5, **changes: Any) -> Cell:
    own = {} if method == "dense" else {"layers": "conv+linear"}
    parts: dict[str, Any] = {
        "pruning": Pruning(method, ratio, settings(finetune_epochs=1, **own)),
        "training": Training("natural", epochs=2, settings=settings(lr=3e-3)),
        "network": Network("mlp", width=0.3),
        "data": Data("digits", limit=300, val_limit=60),
        "perturbations": BOTH,
        "verifier": Verifier("crown", images=50),
    }
    return make_cell(**(parts | changes))


def run(cells: list[Cell], root: Path) -> list[Record]:
    store = Store(root)
    work = execute.Execute.on("cpu", threads=1, data_dir=None, store=store)
    return SerialEngine().run(cells, work, store, Silent())


def numbers(record: Record) -> Any:
    """A record without what honestly differs between two runs: times, memory, and the seal over them."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("timing", "sha256", "seconds", "peak_mb")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(record)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, Record, Path]:
    root = tmp_path_factory.mktemp("reference")
    cell = digits_cell()
    (record,) = run([cell], root)
    assert record["status"] == "done", record.get("error")
    return cell, record, root


def test_a_cell_leaves_every_file(reference: tuple[Cell, Record, Path]) -> None:
    cell, _, root = reference
    names = {path.name for path in (root / cell.key).iterdir()}
    files = {"config.json", "history.jsonl", "examples.jsonl", "model.safetensors", "model.json", "mask.safetensors"}
    assert names == files | {"record.json", ".lock"}


def test_the_record_agrees_with_the_network_on_disk(reference: tuple[Cell, Record, Path]) -> None:
    cell, record, root = reference
    slot = Store(root).slot(cell)
    model = models.load(slot.model_path)
    mask = masks.load(slot.mask_path, model)
    assert mask.density == pytest.approx(0.5, abs=1e-3)
    import datasets

    x, y = datasets.load("digits", split="test", limit=50).tensors()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    brightness, linf = record["results"]
    assert (brightness["kind"], linf["kind"]) == ("brightness", "linf")
    found = certify.verify(model, x, certify.Classification(y), certify.Linf(0.02), method="ibp", attack=False)
    by_ibp = (found.status == certify.Status.HOLDS) & right
    bits = torch.tensor([bit == "1" for bit in linf["verified_bits"]])
    assert bool((bits | ~by_ibp).all())  # CROWN proves at least what intervals prove
    assert linf["clean"] == pytest.approx(float(right.float().mean()))
    for result in record["results"]:
        assert sum(result[name] for name in ("holds", "violated", "unknown", "timeout")) == 50
        assert result["verified"] <= result["attacked"] <= round(50 * result["clean"])
    assert 0 < linf["verified"] < 50
    size = record["size"]
    assert size["parameters"] == models.count(model)
    assert size["prunable_left"] == mask.kept
    assert size["flops_executed"] == size["flops"] > size["flops_nonzero"]


def test_violated_images_break_in_a_plain_forward_pass(reference: tuple[Cell, Record, Path]) -> None:
    cell, _, root = reference
    rows = [row for row in Store(root).slot(cell).examples() if row["perturbation"] == "brightness 0.1"]
    assert [row["index"] for row in rows] == list(range(50))
    assert {row["status"] for row in rows} <= {"holds", "violated", "unknown", "timeout"}
    assert all(row["lower"] > 0 for row in rows if row["status"] == "holds")
    assert all(row["status"] == "violated" for row in rows if row["clean"] == 0.0)


class Killed(BaseException):
    pass


def test_resume_anywhere_gives_identical_numbers(
    reference: tuple[Cell, Record, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, expected, reference_root = reference
    real = os.replace
    for stop in range(1, 40):
        root = tmp_path / str(stop)
        left = stop

        def replace(source: Any, target: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            run([cell], root)
        except Killed:
            killed = True
        else:
            killed = False
        finally:
            monkeypatch.setattr(os, "replace", real)
        (record,) = run([cell], root)
        assert numbers(record) == numbers(expected)
        if not killed:
            break
    assert stop > 5
    ours, theirs = (Store(r).slot(cell).examples() for r in (root, reference_root))
    assert [numbers(row) for row in ours] == [numbers(row) for row in theirs]


@pytest.mark.parametrize("keep", [1, 20, 33, 50, 57, 99])
def test_a_torn_batch_is_certified_again_as_a_whole(
    reference: tuple[Cell, Record, Path], tmp_path: Path, keep: int
) -> None:
    cell, expected, reference_root = reference
    store, source = Store(tmp_path), reference_root / cell.key
    slot = store.slot(cell)
    slot.path.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in ("record.json", ".lock"):
            (slot.path / path.name).write_bytes(path.read_bytes())
    lines = (source / "examples.jsonl").read_bytes().splitlines(keepends=True)
    (slot.path / "examples.jsonl").write_bytes(b"".join(lines[:keep]) + lines[0][:17])
    (record,) = run([cell], tmp_path)
    assert numbers(record) == numbers(expected)
    assert [(row["perturbation"], row["index"]) for row in slot.examples()] == [
        (p.label, i) for p in cell.perturbations for i in range(50)
    ]


@pytest.mark.slow
def test_real_kill_9_of_the_command_and_resume(tmp_path: Path) -> None:
    arguments = ["--preset", "smoke", "--limit", "2", "--threads", "1", "--engine", "serial", "--export"]
    command = [sys.executable, "-m", "runs.compare", *arguments, "--results"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/2]"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert compare.main([*arguments, "--results", str(tmp_path / "killed")]) == 0
    assert compare.main([*arguments, "--results", str(tmp_path / "whole")]) == 0
    killed, whole = (Store(tmp_path / name).scan() for name in ("killed", "whole"))
    assert killed.problems == []
    assert len(whole.records) == 2
    assert [numbers(record) for record in killed.records] == [numbers(record) for record in whole.records]


def test_training_is_shared_by_cells_that_differ_in_certification(
    reference: tuple[Cell, Record, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, expected, root = reference
    other = dataclasses.replace(cell, verifier=Verifier("ibp", images=20))

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(execute.Execute, "_train", refuse)
    (record,) = run([other], root)
    assert record["status"] == "done"
    assert record["training"] == expected["training"]
    assert record["results"][1]["verified"] <= expected["results"][1]["verified"]


def test_data_that_changed_since_starts_the_cell_afresh(
    reference: tuple[Cell, Record, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, expected, _ = reference
    real_get = execute.Library.get

    def fewer(self: execute.Library, *arguments: Any) -> execute.Packs:
        packs = real_get(self, *arguments)
        return dataclasses.replace(packs, train=packs.train.subset(range(200)))

    real_verdicts = certification.verdicts

    def interrupted(*arguments: Any) -> list[dict[str, Any]]:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(execute.Library, "get", fewer)
        patch.setattr(certification, "verdicts", interrupted)
        with pytest.raises(Killed):
            run([cell], tmp_path)
    assert certification.verdicts is real_verdicts
    (record,) = run([cell], tmp_path)
    assert numbers(record) == numbers(expected)


def test_verdicts_on_other_test_images_are_not_kept(reference: tuple[Cell, Record, Path], tmp_path: Path) -> None:
    cell, expected, reference_root = reference
    store = Store(tmp_path)
    slot = store.slot(cell)
    slot.path.mkdir(parents=True)
    for path in (reference_root / cell.key).iterdir():
        if path.name not in ("record.json", ".lock", "examples.jsonl"):
            (slot.path / path.name).write_bytes(path.read_bytes())
    rows = Store(reference_root).slot(cell).examples()[:20]
    slot.append_examples([row | {"data": "0" * 64, "status": "holds"} for row in rows])
    (record,) = run([cell], tmp_path)
    assert numbers(record) == numbers(expected)


def test_a_diverging_cell_fails_with_reason_and_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = digits_cell(training=Training("natural", epochs=2, settings=settings(lr=1e30)))
    good = digits_cell("dense", 0.0)
    records = run([bad, good], tmp_path)
    assert [record["status"] for record in records] == ["failed", "done"]
    assert records[0]["error"]["type"] == "TrainingDiverged"
    assert "epoch" in records[0]["error"]["message"]
    assert compare.main(["report", "--results", str(tmp_path), "--export"]) == 1
    assert "TrainingDiverged" in capsys.readouterr().out


def test_missing_data_fails_the_cell_with_the_path(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    work = execute.Execute.on("cpu", threads=1, data_dir=tmp_path / "nowhere", store=store)
    (record,) = SerialEngine().run([digits_cell(data=Data("mnist"))], work, store, Silent())
    assert record["status"] == "failed"
    assert str(tmp_path / "nowhere") in record["error"]["message"]


def test_keypoints_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Pack

    generator = torch.Generator().manual_seed(0)

    def pack(split: str, n: int) -> Pack:
        images = torch.randint(0, 256, (n, 12, 12, 3), dtype=torch.uint8, generator=generator)
        return Pack("points", split, images, torch.full((n, 4), 6.0), ("a", "b"))

    packs = execute.Packs(pack("train", 40), pack("val", 10), pack("test", 5))
    monkeypatch.setattr(execute.Library, "get", lambda self, *rest: packs)
    cell = digits_cell(verifier=Verifier("ibp", images=5, delta=2.0), perturbations=(Perturb("brightness", 0.01),))
    (record,) = run([cell], tmp_path)
    assert record["status"] == "done", record["error"]
    assert record["data"]["task"] == "keypoints"
    (result,) = record["results"]
    assert result["verified"] == result["holds"]
    assert 0 < result["clean"] < 12  # pixels
    model = models.load(Store(tmp_path).slot(cell).model_path)
    x, y = packs.test.tensors()
    with torch.no_grad():
        error = (model(x) - y).reshape(5, 2, 2).norm(dim=2).mean()
    assert result["clean"] == pytest.approx(float(error), rel=1e-5)


def test_structured_pruning_lowers_what_is_executed(tmp_path: Path) -> None:
    pruning = Pruning("magnitude", 0.5, settings(finetune_epochs=0, layers="conv", structured=True))
    cell = digits_cell(pruning=pruning, network=Network("cnn7_nrs", width=0.125), perturbations=BOTH[:1])
    (record,) = run([dataclasses.replace(cell, verifier=Verifier("ibp", images=5))], tmp_path)
    assert record["status"] == "done", record["error"]
    size = record["size"]
    assert size["flops_executed"] < 0.6 * size["flops"]
    assert size["flops_executed"] <= size["flops_nonzero"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": Training("naturl", epochs=1)}, "unknown training 'naturl'. Did you mean natural"),
        ({"training": Training("ibp", epochs=1)}, "needs a radius"),
        ({"training": Training("natural", epochs=1, eps=0.1)}, "takes no radius"),
        ({"pruning": Pruning("magnitude", 0.5, settings(colour="red"))}, "MagnitudeConfig has no field 'colour'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure.build_config(digits_cell(**changes))


def test_settings_reach_the_methods_configuration() -> None:
    cell = digits_cell(
        "imp",
        pruning=Pruning("imp", 0.8, settings(rounds=3, layers="conv+linear", scope="layer")),
        training=Training("ibp", epochs=7, eps=0.1, settings=settings(lr=0.02, kappa_end=0.25)),
    )
    config = configure.build_config(cell)
    assert (config.ratio, config.epochs, config.rounds, config.layers) == (0.8, 7, 3, ("conv", "linear"))
    assert (config.training.lr, config.training.objective.eps, config.training.objective.kappa_end) == (0.02, 0.1, 0.25)
    assert configure.total_epochs(config) == 28


def test_devices_are_checked() -> None:
    assert execute.resolve_device("cpu").type == "cpu"
    assert execute.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        execute.resolve_device("gpu")
    with pytest.raises(ValueError, match="is not there"):
        execute.resolve_device("cuda:99")


def test_unstable_relus_against_counting_by_hand() -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    ).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, -0.5, 0.0]))
    x = torch.tensor([[[[0.5, 0.5]]], [[[0.9, 0.2]]]])
    # Pre-activations 0, .5, 0 and .4, .6, .7 move by .1, .2, .2 under linf .1.
    assert measure.unstable_relus(model, x, certify.Linf(0.1)).tolist() == [2, 0]


def test_peak_memory_sees_an_allocation() -> None:
    with measure.Peak(torch.device("cpu")) as small:
        pass
    with measure.Peak(torch.device("cpu")) as large:
        block = torch.ones(40_000_000)
    assert block.sum() == 40_000_000
    if small.mb is None or large.mb is None:
        pytest.skip("this system does not tell a process's memory")
    assert large.mb - small.mb == pytest.approx(160, abs=40)


def test_the_environment_is_on_record(reference: tuple[Cell, Record, Path]) -> None:
    environment = reference[1]["environment"]
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in environment["versions"]
    assert environment["threads"] == 1
    assert json.dumps(reference[1], allow_nan=False)
    assert math.isfinite(reference[1]["timing"]["seconds"])
    assert isinstance(reference[1]["network"]["notes"], list | tuple)


def test_history_ends_with_the_trained_network(reference: tuple[Cell, Record, Path]) -> None:
    cell, record, root = reference
    slot: Slot = Store(root).slot(cell)
    rows = slot.history()
    assert [row.get("phase") for row in rows] == ["train", "train", "finetune", None]
    assert record["training"]["epochs"] == 3
    assert rows[-1]["event"] == "trained"
