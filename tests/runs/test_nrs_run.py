"""One small run from training to the exported ticket, killed and resumed on the way."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from runs import execute, export, nrs_states, verify, vnnlib
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.engine import SerialEngine
from runs.execute import Execute
from runs.progress import Silent
from runs.store import DONE, Record, Store
from runs.suites import nrs

EPS = 0.02


def _cell(name: str = "slimming", kind: str = "crown-ibp") -> Cell:
    made = nrs.rule(name, 1, 2, epochs=2)
    return Cell(
        Pruning(made.method, made.ratios[0], made.settings),
        Training(kind, 2, 64, EPS, settings(lr=0.005)),
        Network("cnn7_nrs", width=0.125),
        Data("digits", limit=128, val_limit=20),
        (Perturb("linf", EPS),),
        Verifier("auto", images=6, seconds=30.0, settings=settings(test_images=30, pgd_steps=3)),
    )


def _run(cell: Cell, root: Path, progress: Any = None) -> Record:
    store = Store(root)
    work = Execute.on("cpu", threads=1, data_dir=None, store=store)
    (record,) = SerialEngine().run([cell], work, store, progress or Silent())
    return record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    root = tmp_path_factory.mktemp("nrs")
    record = _run(_cell(), root)
    assert record["status"] == DONE, record.get("error")
    return record, root / record["key"]


def _numbers(record: Record) -> str:
    """A record without what differs from one run to the next: times and memory."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("timing", "seconds", "sha256", "masked")}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return json.dumps(plain(record), sort_keys=True)


def test_every_state_is_certified_and_measured(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    states = record["states"]
    assert [s["index"] for s in states] == [0, 1, 2]
    assert [s["removed"] for s in states] == pytest.approx([0.0, 0.11, 1 - 0.89**2])
    assert [s["epochs"] for s in states] == [2, 2, 2]
    assert record["training"]["epochs"] == 6
    channels = [s["remaining"]["channels"] for s in states]
    assert channels[0] == 1.0 > channels[1] > channels[2]
    assert [s["removal"]["physical"] for s in states] == [False, True, True]
    executed = [s["size"]["flops_executed"] for s in states]
    assert executed[0] > executed[1] > executed[2]
    for state in states:
        (result,) = state["results"]
        assert (result["images"], len(result["std"]), len(result["verified_bits"])) == (6, 30, 6)
        for name in nrs_states.BOUNDS:
            bits = result["bounds"][name]["bits"]
            # A bound proves no more than the complete verifier, which proves no more than PGD leaves.
            assert all(a <= b <= c for a, b, c in zip(bits, result["verified_bits"], result["pgd"]))
        assert all(a <= b <= c for a, b, c in zip(result["pgd"], result["fgsm"], result["std"]))
        assert 0 <= result["stability"]["unstable_ratio"] <= 1
        assert result["stability"]["pre_bn"] is not None
    assert record["results"] == states[record["chosen"]]["results"]
    assert record["chosen"] in (1, 2)
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert [(r["state"], r.get("index")) for r in rows] == [(k, i) for k in range(3) for i in (*range(6), None)]


def test_masks_are_nested_and_files_belong_together(finished: tuple[Record, Path]) -> None:
    _, folder = finished
    found = [nrs_states.load(folder, k) for k in range(3)]
    for (_, wider), (model, mask) in itertools.pairwise(found):
        for name in mask:
            assert not bool((mask[name] & ~wider[name]).any())
            weight = dict(model.named_parameters())[name]
            assert not bool(weight[~mask[name]].any())
    assert not (folder / "training").exists()


def test_killed_while_certifying(
    finished: tuple[Record, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, folder = finished
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    (copied / "record.json").unlink()
    lines = (copied / "examples.jsonl").read_bytes().splitlines(keepends=True)
    # State 0 is complete, of state 1 three verdicts are there and half of the fourth.
    (copied / "examples.jsonl").write_bytes(b"".join(lines[:10]) + lines[10][:30])

    def never(*_: object) -> None:
        raise AssertionError("nothing is trained again")

    monkeypatch.setattr(Execute, "_train", never)
    again = _run(_cell(), tmp_path)
    assert again["status"] == DONE, again.get("error")
    assert _numbers(again) == _numbers(record)
    assert (copied / "examples.jsonl").read_bytes().startswith(b"".join(lines[:7]))


class _Stop(Silent):
    """Interrupts in the third epoch."""

    def step(self, cell: Cell, stage: str, done: float, total: float) -> None:
        if stage == "training" and done == 3:
            raise KeyboardInterrupt


def test_killed_while_training(finished: tuple[Record, Path], tmp_path: Path) -> None:
    record, folder = finished
    with pytest.raises(KeyboardInterrupt):
        _run(_cell(), tmp_path, _Stop())
    assert (tmp_path / record["key"] / "training").is_dir()
    again = _run(_cell(), tmp_path)
    assert _numbers(again) == _numbers(record)
    name = f"{nrs_states.stem(2)}.safetensors"
    assert (tmp_path / record["key"] / name).read_bytes() == (folder / name).read_bytes()


def test_cells_that_differ_in_certification_share_the_run(
    finished: tuple[Record, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, folder = finished
    cell = _cell()
    fewer = Verifier("ibp", images=2, settings=settings(test_images=5, pgd_steps=1))
    other = Cell(cell.pruning, cell.training, cell.network, cell.data, cell.perturbations, fewer)
    monkeypatch.setattr(Execute, "_train", lambda *_: pytest.fail("nothing is trained again"))
    again = _run(other, folder.parent)
    assert again["status"] == DONE, again.get("error")
    assert [len(s["results"][0]["std"]) for s in again["states"]] == [5, 5, 5]
    assert again["states"][1]["remaining"] == record["states"][1]["remaining"]
    shutil.rmtree(folder.parent / again["key"])


def test_fast_ibp_ends_in_the_zoos_network(tmp_path: Path) -> None:
    cell = _cell("imp", "fast-ibp")
    record = _run(cell, tmp_path)
    assert record["status"] == DONE, record.get("error")
    model, mask = nrs_states.load(tmp_path / cell.key, 1)
    assert set(model.state_dict()) == set(
        models.create("cnn7_nrs", 10, in_channels=1, image_size=8, width=0.125).state_dict()
    )
    assert mask.density == pytest.approx(0.8, abs=0.01)
    found = record["states"][1]["results"][0]
    with torch.no_grad():
        x, y = export._pack(cell, None).tensors()
        assert nrs_states.accuracy(model, x, y)[0] == found["std"]


# --- export ---------------------------------------------------------------------------------------------------------
def test_a_ticket_is_exported_and_verified_back(
    finished: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, folder = finished
    out = tmp_path / "benchmark"
    arguments = [str(folder), "--images", "3", "--out", str(out), "--timeout", "20", "--state", "2"]
    assert export.main([*arguments, "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "0 contradict" in shown
    known = list(csv.DictReader((out / "known_results.csv").open()))
    words = {"holds": "unsat", "violated": "sat", "unknown": "unknown", "timeout": "unknown"}
    ticket = export.find(folder, 2)
    assert [row["consensus"] for row in known] == [words[v] for v in ticket.verdicts(Perturb("linf", EPS))[:3]]
    about = json.loads((out / "about.json").read_text())
    assert about["state"] == 2
    assert about["size"] == record["states"][2]["size"]
    prop = vnnlib.load(out / "image-0000.vnnlib", (1, 8, 8), 10)
    (region,) = prop.regions
    x, _ = export._pack(ticket.cell, None).tensors([0])
    low = (x.double() - EPS).clamp(min=0).flatten()
    torch.testing.assert_close(torch.from_numpy(region.lo), low, rtol=0, atol=1e-12)
    assert len(region.unsafe) == 9


def test_the_exported_network_is_the_small_one(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    x = torch.rand(3, 1, 8, 8)
    small = export.network(export.find(folder, 2), x[:1])
    model, mask = nrs_states.load(folder, 2)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert models.count(small) < models.count(model)
    assert mask.structured
    assert export.find(folder).state == record["chosen"]


def test_a_wrong_verdict_on_record_is_noticed(
    finished: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = finished
    export.main([str(folder), "--images", "1", "--out", str(tmp_path), "--state", "0", "--timeout", "20"])
    rows = list(csv.reader((tmp_path / "known_results.csv").open()))
    rows[1][2] = {"sat": "unsat", "unsat": "sat"}[rows[1][2]]
    with (tmp_path / "known_results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert verify.main(["--instances", str(tmp_path / "instances.csv"), "--results", str(tmp_path / "r")]) == 1
    assert "1 contradict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--state", "7"], "has the states 0 to 2, got 7"),
        (["--images", "0"], "must be above 0"),
        (["--perturbation", "brightness:0.1"], "only classes under linf"),
    ],
)
def test_wrong_usage_is_explained(
    finished: tuple[Record, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert export.main([str(finished[1]), "--out", str(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_record_is_no_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path)]) == 2
    assert "no record.json" in capsys.readouterr().err


def test_the_test_set_is_as_large_as_the_verifier_says() -> None:
    assert execute.test_images(_cell()) == 30
