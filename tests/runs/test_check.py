"""Re-attacking what is on record: true verdicts stand, forged ones break, missing files are named."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import certify
from certify import lirpa
from runs import check, checked, compare, execute, measure, witness
from runs.cell import Cell, Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.checked import Effort, Finding, OutOfTime
from runs.engine import SerialEngine
from runs.progress import Silent
from runs.reattack import Question, Worst, require_members, search
from runs.store import Store, append_lines, seal
from tests.runs.handmade import make_cell

WEIGHT = torch.tensor([[1.0, -0.5, 0.25, 0.25], [-0.5, 0.75, 0.0, 0.5]])
BIAS = torch.tensor([0.0, 0.3])  # a black image is of class 1


def nothing() -> None:
    """No budget."""


def linear() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[1].weight.copy_(WEIGHT)
        net[1].bias.copy_(BIAS)
    return net


def images(n: int, channels: int = 1) -> Tensor:
    """Images clearly of class 0."""
    noise = 0.1 * torch.rand(n, channels, 2, 2, generator=torch.Generator().manual_seed(3))
    return torch.tensor([[0.7, 0.2], [0.5, 0.2]]) + noise


def question(p: certify.Perturbation, n: int = 3, *, keypoints: bool = False, delta: float = 1.0) -> Question:
    net, x = linear(), images(n)
    with torch.no_grad():
        reference = net(x)
    return Question(net, p, x, reference, None if keypoints else reference.argmax(1), delta)


def gaps(q: Question) -> tuple[Tensor, Tensor]:
    """Each image's row (label minus other) of a linear network, (N, 4), and its value at the image, (N,)."""
    assert q.y is not None
    rows = torch.stack([WEIGHT[label] - WEIGHT[1 - label] for label in q.y])
    return rows, (rows * q.x.flatten(1)).sum(1) + torch.stack([BIAS[label] - BIAS[1 - label] for label in q.y])


def test_a_ball_is_searched_to_its_worst_corner() -> None:
    q = question(certify.Linf(0.05))
    rows, value = gaps(q)
    found = search(q, 200, nothing)
    assert found.margin.tolist() == pytest.approx((value - 0.05 * rows.abs().sum(1)).tolist(), abs=1e-5)
    assert found.probes >= 3 * 200
    q = question(certify.L2(0.05))
    found = search(q, 200, nothing)
    assert found.margin.tolist() == pytest.approx((value - 0.05 * rows.norm(dim=1)).tolist(), abs=1e-4)


def test_a_line_is_searched_to_its_worst_parameter() -> None:
    q = question(certify.Brightness(0.1))
    rows, value = gaps(q)
    found = search(q, 100, nothing)
    assert found.margin.tolist() == pytest.approx((value - 0.1 * rows.sum(1).abs()).tolist(), abs=1e-6)
    q = question(certify.BrightnessContrast(0.1, 0.2))
    rows, value = gaps(q)
    gain = (rows * q.x.flatten(1)).sum(1)
    worst = value - 0.1 * rows.sum(1).abs() - 0.2 * gain.abs()
    assert search(q, 400, nothing).margin.tolist() == pytest.approx(worst.tolist(), abs=1e-5)


def test_the_worst_parameter_inside_is_found_by_refining() -> None:
    class Dip(nn.Module):
        """Two outputs whose gap is (brightness - 0.0371)² - 0.0001: negative for 0.02 around 0.0371."""

        def forward(self, x: Tensor) -> Tensor:
            gap = (x.flatten(1).mean(1) - 0.5371) ** 2 - 1e-4
            return torch.stack([gap, torch.zeros_like(gap)], 1)

    x = torch.full((1, 1, 2, 2), 0.5)
    q = Question(Dip().eval(), certify.Brightness(0.4), x, Dip()(x), torch.tensor([0]), 1.0)
    coarse = search(q, 10, nothing)  # a grid of 10 points, every 0.09, then two finer ones
    assert float(coarse.margin[0]) < 0
    assert float(search(q, 1000, nothing).margin[0]) == pytest.approx(-1e-4, abs=1e-6)


def test_hue_is_searched_as_the_exact_verifier_does() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 12, generator=torch.Generator().manual_seed(2)))
        net[1].bias.zero_()
        reference = net(x)
    p, y = certify.Hue(0.2), reference.argmax(1)
    found = search(Question(net, p, x, reference, y, 1.0), 500, nothing)
    exact = certify.verify(net, x, certify.Classification(y), p, method="line")
    holds = exact.status == certify.Status.HOLDS
    assert bool(holds.any())
    assert not bool(holds.all())
    assert ((found.margin > 0) == holds).all()
    assert bool((found.margin[holds] >= exact.lower[holds] - 1e-4).all())


def test_keypoints_are_searched_for_the_farthest_move() -> None:
    q = question(certify.Brightness(0.1), keypoints=True, delta=0.5)
    assert search(q, 50, nothing).margin.tolist() == pytest.approx([0.5 - 0.1] * 3, abs=1e-6)


def test_an_attack_that_cheats_is_noticed() -> None:
    q = question(certify.L2(0.1))
    require_members(q, q.x + 0.04)
    with pytest.raises(AssertionError, match="left L2"):
        require_members(q, q.x + 0.06)  # inside the box around the ball, not inside the ball
    with pytest.raises(AssertionError, match="at image 1"):
        require_members(q, torch.stack([q.x[0], q.x[1] + 0.2, q.x[2]]))


CELL = make_cell(verifier=Verifier("auto", images=3))


def row(index: int, status: str, lower: float | None = None, **more: Any) -> dict[str, Any]:
    return {"index": index, "perturbation": "p", "status": status, "lower": lower, **more}


def examined(q: Question, rows: list[dict[str, Any]], cross: int = 0) -> Finding:
    out = Finding()
    check.examine(q, rows, CELL, Effort(100, cross), nothing, out)
    return out


PERTURBATIONS = [certify.Linf, certify.L2, certify.Brightness, certify.Contrast]


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_true_verdicts_stand_and_forged_ones_break(kind: Any) -> None:
    for radius in (0.01, 0.9):
        q = question(kind(radius))
        truth = certify.verify(q.model, q.x, q.spec, q.p, method="auto")
        status = [certify.Status(s).name.lower() for s in truth.status.tolist()]
        rows = [row(i, s, float(truth.lower[i])) for i, s in enumerate(status)]
        assert examined(q, rows).breaks == []
        for i, s in enumerate(status):
            forged = [*rows[:i], row(i, "violated" if s == "holds" else "holds"), *rows[i + 1 :]]
            (line,) = examined(q, forged).breaks
            assert line.startswith(f"image {i} under p")
            assert ("HOLDS on record, but the margin is -" in line) == (s != "holds")
        assert set(status) == ({"holds"} if radius == 0.01 else {"violated"})


@pytest.mark.parametrize("kind", [certify.Linf, certify.L2, certify.Brightness, certify.BrightnessContrast])
def test_a_counterexample_on_record_is_replayed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q = question(kind(*[0.9] * (2 if kind is certify.BrightnessContrast else 1)))
    truth = certify.verify(q.model, q.x, q.spec, q.p, method="auto")
    rows = [row(i, "violated", **witness.kept(truth, i)) for i in range(3)]
    assert all(json.loads(json.dumps(r)) == r and witness.KEY in r for r in rows)
    monkeypatch.setattr(check, "search", None)  # nothing is searched
    monkeypatch.setattr(certify, "verify", None)
    out = examined(q, rows)
    assert (out.breaks, out.violated, out.probes) == ([], 3, 3)
    tiny = {"parameters": [1e-4] * getattr(q.p, "parameters", 0)}
    if not getattr(q.p, "parameters", 0):
        image = truth.counterexamples.clone()
        image[1] = q.x[1] + 1e-4
        tiny = witness.kept(dataclasses.replace(truth, counterexamples=image), 1)[witness.KEY]
    (line,) = examined(q, [rows[0], rows[1] | {witness.KEY: tiny}, rows[2]]).breaks
    assert line.startswith("image 1 under p is VIOLATED on record, but its counterexample has the margin 0.")


def test_a_counterexample_outside_of_the_set_is_refused() -> None:
    q = question(certify.Brightness(0.1), n=1)
    with pytest.raises(ValueError, match=r"image 4 lies outside of Brightness\(0\.1\)"):
        witness.given({"index": 4, witness.KEY: {"parameters": [0.2]}}, q.p, q.x)
    with pytest.raises(ValueError, match="has parameters, but Linf"):
        witness.given({"index": 4, witness.KEY: {"parameters": [0.2]}}, certify.Linf(0.1), q.x)
    with pytest.raises(ValueError, match="has 1 values, not 4"):
        witness.given({"index": 4, witness.KEY: {"image": "AAAAAA=="}}, certify.Linf(0.1), q.x)
    assert witness.given({"index": 4}, q.p, q.x) is None


def test_a_counterexample_that_is_not_found_again_is_no_break(monkeypatch: pytest.MonkeyPatch) -> None:
    q = question(certify.Linf(0.9))
    unknown = certify.verify(q.model, q.x, q.spec, q.p, method="ibp", attack=False)
    assert set(unknown.status.tolist()) == {certify.Status.UNKNOWN}
    monkeypatch.setattr(check, "search", lambda q, *rest: Worst(torch.ones(len(q.x)), q.x))
    monkeypatch.setattr(certify, "verify", lambda *a, **k: unknown)
    out = examined(q, [row(i, "violated") for i in range(3)])
    assert (out.breaks, out.violated, out.lost) == ([], 3, 3)
    assert "3 VIOLATED not found again, which decides nothing" in out.line()


def test_a_certified_margin_that_is_undercut_is_a_break() -> None:
    q = question(certify.Linf(0.01))
    rows, value = gaps(q)
    least = (value - 0.01 * rows.abs().sum(1)).tolist()
    assert examined(q, [row(i, "holds", m - 1e-6) for i, m in enumerate(least)]).breaks == []
    (line,) = examined(q, [row(0, "holds", least[0] + 0.01), row(1, "holds", None), row(2, "unknown", 9.0)]).breaks
    assert "has the certified margin" in line


def test_what_float64_does_not_confirm_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Finding()
    check._judge_holds(row(0, "holds", 1e-9), -1e-9, 1e-9, 1e-4, out)
    assert (out.rounding, out.breaks) == (1, [])
    check._judge_holds(row(0, "holds", 1e-9), -1e-9, -1e-9, 1e-4, out)
    assert len(out.breaks) == 1


def test_the_enclosure_of_the_largest_deviation_is_checked() -> None:
    q = question(certify.Brightness(0.1), n=1, keypoints=True)
    far = 0.1  # times the larger sum of a row of weights, which is 1
    good = {"deviation_low": far - 1e-4, "deviation_high": far + 1e-4, "deviation_at": [0.1]}
    assert examined(q, [row(0, "holds", 1 - far, **good)]).breaks == []
    (line,) = examined(q, [row(0, "holds", None, **(good | {"deviation_high": 0.05, "deviation_low": 0.04}))]).breaks
    assert "should move by at most 0.05 px, but moves by 0.1" in line
    (line,) = examined(q, [row(0, "holds", None, **(good | {"deviation_at": [0.01]}))]).breaks
    assert "at its worst parameter, not by 0.0" in line


def test_lirpa_may_prove_less_but_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    q = question(certify.Linf(0.01))
    rows = [row(i, "holds") for i in range(3)]
    monkeypatch.setattr(lirpa, "available", lambda: True)

    def bounds(lower: float) -> Any:
        return lambda model, x, p, method, C: (torch.full((1, 1), lower), torch.full((1, 1), math.inf))

    monkeypatch.setattr(lirpa, "bounds", bounds(-1.0))
    out = examined(q, rows, cross=2)
    assert (out.crossed, out.confirmed, out.breaks) == (2, 0, [])
    monkeypatch.setattr(lirpa, "bounds", bounds(5.0))
    assert ["by auto-LiRPA" in line for line in examined(q, rows, cross=2).breaks] == [True, True]


def test_large_networks_are_bounded_by_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def bounds(model: Any, x: Tensor, p: Any, method: str, C: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(method)
        return torch.full((1, 1), -1.0), torch.full((1, 1), 1.0)

    monkeypatch.setattr(lirpa, "available", lambda: True)
    monkeypatch.setattr(lirpa, "bounds", bounds)
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    q = question(certify.Linf(0.0), n=1)
    with torch.no_grad():
        q = Question(net, q.p, q.x, net(q.x), net(q.x).argmax(1), 1.0)
    assert measure.relus(net, q.x) == 12
    examined(q, [row(0, "holds")], cross=1)
    monkeypatch.setattr(check, "CROWN_RELUS", 11)
    examined(q, [row(0, "holds")], cross=1)
    assert asked == ["CROWN", "IBP"]


@pytest.mark.skipif(not lirpa.available(), reason="needs auto-LiRPA")
def test_lirpa_proves_a_linear_network_exactly() -> None:
    out = examined(question(certify.Linf(0.01)), [row(i, "holds") for i in range(3)], cross=3)
    assert (out.crossed, out.confirmed, out.breaks) == (3, 3, [])


# Whole cells, through the command.


def digits_cell(seed: int) -> Cell:
    return Cell(
        Pruning("magnitude", 0.5, settings(finetune_epochs=1, layers="conv+linear")),
        Training("natural", epochs=2, settings=settings(lr=3e-3)),
        Network("mlp", width=0.3),
        Data("digits", limit=300, val_limit=60),
        (Perturb("linf", 0.02), Perturb("brightness", 0.3)),
        Verifier("auto", images=20, seconds=1.0),
        seed,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    store = Store(root)
    work = execute.Execute.on("cpu", threads=1, data_dir=None, store=store)
    records = SerialEngine().run([digits_cell(seed) for seed in range(2)], work, store, Silent())
    assert [record["status"] for record in records] == ["done", "done"], records[0].get("error")
    return root


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "results"))


def run(results: Path, *more: str) -> int:
    return compare.main(["check", "--results", str(results), "--probes", "100", "--cross", "0", *more])


def test_what_is_on_record_stands(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(results) == 0
    shown = capsys.readouterr().out
    assert "[2/2] digits · mlp ×0.3 · magnitude 0.5 · natural · seed" in shown
    records = Store(results).scan().records
    holds, violated = (sum(r[name] for record in records for r in record["results"]) for name in ("holds", "violated"))
    assert min(holds, violated) > 0
    assert f"Checked 2 of 2 cells: {holds} HOLDS, {violated} VIOLATED" in shown
    entries = json.loads((results / checked.FILE).read_text())["cells"]
    assert sorted(entries) == sorted(record["key"] for record in records)
    assert sum(entry["probes"] for entry in entries.values()) > 100 * holds
    assert compare.main(["report", "--results", str(results), "--export"]) == 0
    assert f"Check: 2 of 2 cells, {holds} HOLDS re-attacked" in capsys.readouterr().out


def forge(results: Path) -> str:
    """Turn the first VIOLATED of a cell into a HOLDS, checksums and counts and all; returns the cell's key."""
    slot = Store(results).slot(digits_cell(0))
    record = slot.record()
    assert record is not None
    rows = slot.examples()
    victim = next(r for r in rows if r["status"] == "violated" and r["clean"] == 1.0)
    victim["status"] = "holds"
    result = next(r for r in record["results"] if r["label"] == victim["perturbation"])
    result["holds"] += 1
    result["violated"] -= 1
    (slot.path / "examples.jsonl").unlink()
    append_lines(slot.path / "examples.jsonl", rows)
    (slot.path / "record.json").write_text(json.dumps(seal(record)))
    return slot.cell.key


def test_a_forged_verdict_fails_the_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = forge(results)
    assert run(results) == 1
    shown = capsys.readouterr().out
    assert "1 BREAKS: image" in shown
    assert "HOLDS on record, but the margin is -" in shown
    assert "2 of 2 cells" in shown
    assert len(json.loads((results / checked.FILE).read_text())["cells"][key]["breaks"]) == 1
    compare.main(["report", "--results", str(results), "--export"])
    assert "1 BREAKS (see check.json)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.json").write_text("{}"), "model.json is damaged"),
        (lambda folder: (folder / "history.jsonl").unlink(), "history.jsonl is missing or damaged"),
        (lambda folder: (folder / "examples.jsonl").write_bytes(b""), "holds 0 of 20 verdicts under brightness 0.3"),
    ],
)
def test_missing_and_damaged_files_are_named_and_the_others_checked(
    results: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(results / digits_cell(0).key)
    assert run(results) == 1
    shown = capsys.readouterr().out
    assert message in shown
    assert shown.count("NOT CHECKED") == 1
    assert shown.count("no break") == 2  # the other cell's line, and the last one
    assert "1 cells could not be checked" in shown


def test_verdicts_that_the_record_does_not_count_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slot = Store(results).slot(digits_cell(1))
    record = slot.record()
    assert record is not None
    record["results"][0]["holds"] += 1
    (slot.path / "record.json").write_text(json.dumps(seal(record)))
    assert run(results) == 1
    assert "and the record disagree on the verdicts under brightness 0.3" in capsys.readouterr().out


def test_other_images_than_those_certified_are_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    real = datasets.load
    monkeypatch.setattr(datasets, "load", lambda *a, limit=None, **k: real(*a, limit=limit - 1, **k))
    assert run(results) == 1
    assert "are not those that were certified" in capsys.readouterr().out


def test_a_budget_stops_in_time_and_the_next_check_goes_on(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(results, "--budget", "1e-6") == 0
    shown = capsys.readouterr().out
    assert "(stopped by the budget)" in shown
    assert "Checked 0 of 2 cells" in shown
    assert "the same command goes on with the others" in shown
    assert run(results, "--limit", "1") == 0
    assert "Checked 1 of 1 cells" in capsys.readouterr().out
    records = Store(results).scan().records
    entries = json.loads((results / checked.FILE).read_text())["cells"]
    last = next(key for key, entry in entries.items() if entry["complete"])
    assert [record["key"] for record in checked.order(records, results)][-1] == last


def test_a_tick_may_stop_anywhere(made: Path) -> None:
    """However far it gets, what has been found so far is kept and nothing is claimed of the rest."""
    store = Store(made)
    checker = check.Checker(store, torch.device("cpu"), None, Effort(20, 0))
    record = store.record(digits_cell(0))
    assert record is not None
    for stop in range(1, 200, 7):
        left = stop

        def tick() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OutOfTime

        found = checker.check(record, tick, lambda *news: None)
        assert found.breaks == found.problems == []
        if found.complete:
            break
    assert found.complete
    assert stop > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "1"], "need --probes >= 10"),
        (["--cross", "-1"], "--cross >= 0"),
        (["--budget", "0"], "--budget is a number of seconds > 0"),
    ],
)
def test_wrong_numbers_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_on_record_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["check", "--results", str(tmp_path)]) == 2
    assert "no finished records under" in capsys.readouterr().err
