"""The command-line verifier: verdicts against dense grids, counterexamples against onnxruntime, benchmark folders."""

import csv
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from certify import Status
from runs import decide, instances, onnx, splitting, verify, vnnlib


def net(inputs=2, outputs=2, seed=0, width=12):
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers).eval()


def text(inputs, outputs, low, high, *assertions):
    lines = [f"(declare-const {k}_{i} Real)" for k, n in (("X", inputs), ("Y", outputs)) for i in range(n)]
    lines += [f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))" for i in range(inputs)]
    return "\n".join([*lines, *assertions])


def grid(model, points=301):
    axis = torch.linspace(-1, 1, points)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        return x, model(x)


def files(tmp_path, model, inputs, prop, name="m"):
    path = onnx.export(model, tmp_path / f"{name}.onnx", (inputs,))
    (tmp_path / f"{name}.vnnlib").write_text(prop)
    return path, tmp_path / f"{name}.vnnlib"


def solve(tmp_path, model, inputs, prop, seconds=20.0):
    return verify.solve(*files(tmp_path, model, inputs, prop), seconds, "cpu", 1, 0)


# The worst row as a network.


def test_safety_margins_are_the_largest_rows_of_each_conjunction():
    rng = np.random.default_rng(0)
    conjunctions = tuple(
        vnnlib.Conjunction(rng.normal(size=(rows, 4)), rng.normal(size=rows), np.zeros(rows, bool))
        for rows in (1, 3, 5)
    )
    margins = decide.SafetyMargins(nn.Identity(), conjunctions)
    y = torch.randn(50, 4, dtype=torch.float64)
    expected = np.stack([(y.numpy() @ c.C.T + c.d).max(1) for c in conjunctions], 1)
    np.testing.assert_allclose(margins(y).numpy(), expected, atol=1e-12)
    for row, point in zip(margins(y), y):
        assert any(c.contains(point.numpy()) for c in conjunctions) == bool((row <= 0).any())


# Splitting.


@pytest.mark.parametrize("seed", range(4))
def test_splitting_agrees_with_a_dense_grid_on_both_sides_of_the_minimum(seed):
    model = net(seed=seed)
    _, y = grid(model)
    smallest = float((y[:, 0] - y[:, 1]).min())
    C, one = torch.tensor([[1.0, -1.0]]), torch.ones(2)
    above = splitting.split(model, -one, one, C, torch.tensor([-smallest + 0.01]), seconds=20)
    assert above.status == Status.HOLDS
    assert 0 < above.lower <= 0.01 + 1e-6
    below = splitting.split(model, -one, one, C, torch.tensor([-smallest - 0.001]), seconds=20)
    assert below.status == Status.VIOLATED
    found = model.double()(below.counterexample.unsqueeze(0)) @ C.double().T - smallest - 0.001
    assert float(found) <= 0
    assert bool((below.counterexample.abs() <= 1).all())


def test_splitting_gives_up_in_time_with_a_sound_bound():
    model = net(inputs=8, width=64, seed=1)
    C, one = torch.tensor([[1.0, -1.0]]), torch.ones(8)
    with torch.no_grad():
        y = model(2 * torch.rand(20000, 8) - 1)
    d = -(y[:, 0] - y[:, 1]).min() + 0.3
    start = time.monotonic()
    result = splitting.split(model, -one, one, C, d.reshape(1), seconds=0.2)
    assert time.monotonic() - start < 5
    assert result.status == Status.TIMEOUT
    assert result.lower <= float(((y @ C.T) + d).min())


def test_an_unconfirmed_point_does_not_end_the_search():
    asked = []
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.fill_(0.0)

    def confirm(x):
        asked.append(float(x))
        return False

    zero = torch.zeros(1)
    result = splitting.split(model, zero, zero + 1, torch.ones(1, 1), zero, seconds=20, confirm=confirm)
    assert asked
    assert result.status == Status.UNKNOWN
    assert result.lower == pytest.approx(0, abs=1e-9)


# A whole property.


def test_disjunction_holds_when_every_output_case_is_out_of_reach(tmp_path):
    model = net()
    _, y = grid(model)
    top = y.max(0).values
    cases = f"(assert (or (and (>= Y_0 {float(top[0]) + 0.05})) (and (>= Y_1 {float(top[1]) + 0.05}))))"
    answer = solve(tmp_path, model, 2, text(2, 2, -1, 1, cases))
    assert answer.verdict == "holds"
    assert 0 < answer.lower <= 0.05 + 1e-6
    assert answer.counterexample is None


def test_conjunction_is_judged_as_a_whole(tmp_path):
    """Each row alone is reachable; both together are not, and become so when one is relaxed."""
    model = net(seed=2)
    _, y = grid(model)
    high = y[:, 0] >= y[:, 0].quantile(0.9)
    best = float(y[high, 1].max())
    first = f"(assert (>= Y_0 {float(y[:, 0].quantile(0.9))}))"
    apart = solve(tmp_path, model, 2, text(2, 2, -1, 1, first, f"(assert (>= Y_1 {best + 0.02}))"))
    assert apart.verdict == "holds"
    together = solve(tmp_path, model, 2, text(2, 2, -1, 1, first, f"(assert (>= Y_1 {best - 0.02}))"))
    assert together.verdict == "violated"
    assert float(y[:, 1].max()) > best or best == float(y[:, 1].max())
    x, out = together.counterexample
    assert max(map(abs, x)) <= 1
    assert out[0] >= float(y[:, 0].quantile(0.9))
    assert out[1] >= best - 0.02


def test_regions_are_all_checked(tmp_path):
    model = net(seed=3)
    x, y = grid(model)
    right = x[:, 0] >= 0.5
    limit = float(y[~right, 0].max()) + 0.01
    whole = "(and (>= X_0 {}) (<= X_0 {}) (>= X_1 -1) (<= X_1 1) (>= Y_0 {}))"
    head = "\n".join(f"(declare-const {v} Real)" for v in ("X_0", "X_1", "Y_0", "Y_1"))
    safe = f"{head}(assert (or {whole.format(-1, 0, limit)} {whole.format(0, 0.49, limit)}))"
    assert solve(tmp_path, model, 2, safe).verdict == "holds"
    peak = float(y[right, 0].max()) - 0.01
    mixed = f"{head}(assert (or {whole.format(-1, 0, limit)} {whole.format(0.5, 1, peak)}))"
    answer = solve(tmp_path, model, 2, mixed)
    assert answer.verdict == "violated"
    assert 0.5 <= answer.counterexample[0][0] <= 1
    assert answer.work["regions"] == 2


def test_many_inputs_go_to_the_complete_verifier(tmp_path):
    model = net(inputs=20, width=16, seed=4)
    with torch.no_grad():
        y = model(0.05 * (2 * torch.rand(4000, 20) - 1))
    gap = y[:, 0] - y[:, 1]
    holds = solve(tmp_path, model, 20, text(20, 2, -0.05, 0.05, f"(assert (<= Y_0 (+ Y_1 {float(gap.min()) - 0.5})))"))
    assert holds.verdict == "holds"
    assert 0 < holds.lower < 0.5
    violated = solve(tmp_path, model, 20, text(20, 2, -0.05, 0.05, f"(assert (<= Y_0 (+ Y_1 {float(gap.min())})))"))
    assert violated.verdict == "violated"
    x, out = violated.counterexample
    assert max(map(abs, x)) <= 0.05
    assert out[0] <= out[1] + float(gap.min())


def test_what_onnxruntime_does_not_confirm_is_not_reported(tmp_path):
    model = net()
    path, prop = files(tmp_path, model, 2, text(2, 2, -1, 1, "(assert (<= Y_0 100))"))
    network = onnx.load(path)
    problem = vnnlib.load(prop, (2,), 2)
    truth = decide.decide(network, onnx.Runtime(path), problem, seconds=5)
    assert truth.verdict == "violated"

    class Contrary:
        def __call__(self, x):
            return np.full((1, 2), 1000.0)

    doubted = decide.decide(network, Contrary(), problem, seconds=1)
    assert doubted.verdict in ("unknown", "timeout")
    assert doubted.counterexample is None
    assert doubted.notes == (decide.UNCONFIRMED,)


def test_boxes_are_rounded_outward_for_proofs_and_inward_for_counterexamples(tmp_path):
    path, _ = files(tmp_path, net(), 2, "")
    box = "(assert (>= X_0 0.1))(assert (<= X_0 0.7))(assert (>= X_1 0.3))(assert (<= X_1 0.3))(assert (>= Y_0 0))"
    head = "".join(f"(declare-const {v} Real)" for v in ("X_0", "X_1", "Y_0", "Y_1"))
    (region,) = vnnlib.parse(head + box, (2,), 2).regions
    question = decide.ask(onnx.load(path), region)
    lo, hi = question.lo.double().flatten().numpy(), question.hi.double().flatten().numpy()
    assert (lo <= region.lo).all()
    assert (hi >= region.hi).all()
    assert (hi - lo - (region.hi - region.lo) < 1e-7).all()
    inner = [v.astype(np.float64) for v in question.inner]
    assert region.lo[0] <= inner[0][0] <= inner[1][0] <= region.hi[0]
    assert inner[0][1] == inner[1][1] == np.float32(0.3)  # 0.3 has no float32: the nearest one stands for it


# The command line.


def run(capsys, *arguments):
    status = verify.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_first_line_is_the_verdict_and_the_counterexample_can_be_replayed(tmp_path, capsys):
    model = net()
    paths = files(tmp_path, model, 2, text(2, 2, -0.3, 0.1, "(assert (<= Y_0 100))"))
    status, out, _ = run(capsys, *paths, "--timeout", 20)
    assert (status, out[0]) == (0, "violated")
    values = dict(line.strip("()").split() for line in out if line.strip("(").startswith(("X_", "Y_")))
    x = np.array([float(values["X_0"]), float(values["X_1"])])
    assert ((x >= -0.3) & (x <= 0.1)).all()
    np.testing.assert_array_equal(onnx.Runtime(paths[0])(x)[0], [float(values["Y_0"]), float(values["Y_1"])])


def test_json_follows_the_verdict(tmp_path, capsys):
    paths = files(tmp_path, net(), 2, text(2, 2, -1, 1, "(assert (>= Y_0 100))"))
    status, out, _ = run(capsys, *paths, "--timeout", 20, "--json", "--threads", 1)
    assert (status, out[0], len(out)) == (0, "holds", 2)
    answer = json.loads(out[1])
    assert answer["verdict"] == "holds"
    assert answer["lower"] > 0
    assert answer["counterexample"] is None


def test_gzipped_files_work_too(tmp_path, capsys):
    paths = files(tmp_path, net(), 2, text(2, 2, -1, 1, "(assert (>= Y_0 100))"))
    packed = [p.with_name(p.name + ".gz") for p in paths]
    for a, b in zip(paths, packed):
        b.write_bytes(gzip.compress(a.read_bytes()))
    assert run(capsys, *packed)[1][0] == "holds"


def test_a_step_that_forgets_the_clock_is_interrupted(tmp_path, monkeypatch, capsys):
    def sleepy(*args, **kwargs):
        time.sleep(30)

    monkeypatch.setattr(decide, "decide", sleepy)
    monkeypatch.setattr(verify, "GRACE", 0.1)
    paths = files(tmp_path, net(), 2, text(2, 2, -1, 1, "(assert (>= Y_0 100))"))
    start = time.monotonic()
    status, out, _ = run(capsys, *paths, "--timeout", 0.5)
    assert (status, out[0]) == (0, "timeout")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{m}", "{p}", "--timeout", "0"], "seconds > 0, got '0'"),
        (["{m}", "{p}", "--timeout", "soon"], "seconds > 0, got 'soon'"),
        (["{m}", "{p}", "--threads", "0"], "threads >= 1"),
        (["{m}"], "give MODEL.onnx and PROPERTY.vnnlib"),
        (["{m}", "{p}", "--instances", "x.csv"], "give MODEL.onnx and PROPERTY.vnnlib"),
        (["none.onnx", "{p}"], "no ONNX file none.onnx"),
        (["{m}", "none.vnnlib"], "no property file none.vnnlib"),
        (["{m}", "{m}"], "cannot be read as text"),
        (["{m}", "{p}", "--device", "abacus"], "unknown device 'abacus'"),
        (["{m}", "{other}"], "declares 3 inputs"),
        (["--instances", "none.csv"], "no list of instances none.csv"),
    ],
)
def test_bad_input_is_explained_with_status_2(arguments, message, tmp_path, capsys):
    model, prop = files(tmp_path, net(), 2, text(2, 2, -1, 1, "(assert (>= Y_0 100))"))
    (tmp_path / "other.vnnlib").write_text(text(3, 2, -1, 1, "(assert (>= Y_0 100))"))
    filled = [a.format(m=model, p=prop, other=tmp_path / "other.vnnlib") for a in arguments]
    try:
        status = verify.main(filled)
    except SystemExit as e:
        status = e.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert message in captured.err


def test_help_needs_no_torch():
    code = "import sys, runs.verify; runs.verify.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Benchmarks.


@pytest.fixture
def folder(tmp_path):
    """Two instances that hold and are violated, one that cannot be read, with known results for the first two."""
    model = net()
    files(tmp_path, model, 2, text(2, 2, -1, 1, "(assert (>= Y_0 100))"), "easy")
    files(tmp_path, model, 2, text(2, 2, -1, 1, "(assert (<= Y_0 100))"), "wrong")
    packed = tmp_path / "wrong.vnnlib.gz"
    packed.write_bytes(gzip.compress((tmp_path / "wrong.vnnlib").read_bytes()))
    (tmp_path / "wrong.vnnlib").unlink()
    (tmp_path / "list.csv").write_text("easy.onnx,easy.vnnlib,30\n./wrong.onnx,wrong.vnnlib,30\n")
    known(tmp_path, "unsat", "sat")
    return tmp_path


def known(folder, *verdicts):
    rows = [("easy.onnx", "easy.vnnlib", verdicts[0]), ("wrong.onnx", "wrong.vnnlib", verdicts[1])]
    with (folder / "known_results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("onnx", "vnnlib", "consensus"), *rows])


def test_a_benchmark_is_compared_kept_and_resumed(folder, capsys, monkeypatch):
    arguments = ("--instances", folder / "list.csv", "--results", folder / "results")
    status, out, _ = run(capsys, *arguments, "--export", "md", "csv", "json")
    assert status == 0
    assert any("2 with a known result: 2 agree, 0 contradict" in line for line in out)
    stem = f"{folder.name}-list"
    table = list(csv.DictReader((folder / "results" / f"{stem}.csv").open()))
    assert [(r["verdict"], r["against known"]) for r in table] == [("holds", "agrees"), ("violated", "agrees")]
    assert "| easy | easy | holds | holds | agrees |" in (folder / "results" / f"{stem}.md").read_text()
    full = json.loads((folder / "results" / f"{stem}.json").read_text())
    assert full[1]["counterexample"] is not None

    lines = folder / "results" / f"{stem}.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])  # killed while writing the second line
    asked = []
    real = verify.solve
    monkeypatch.setattr(verify, "solve", lambda *a, **k: asked.append(a[0].name) or real(*a, **k))
    status, out, _ = run(capsys, *arguments, "--json")
    assert (status, asked) == (0, ["wrong.onnx"])
    assert [r["against_known"] for r in json.loads(out[0])] == ["agrees", "agrees"]
    run(capsys, *arguments, "--timeout", 20)
    assert asked == ["wrong.onnx", "easy.onnx", "wrong.onnx"]
    run(capsys, *arguments, "--timeout", 20, "--force")
    assert len(asked) == 5


def test_a_contradiction_gives_status_1(folder, capsys):
    known(folder, "sat", "unknown")
    status, out, _ = run(capsys, "--instances", folder / "list.csv", "--results", folder / "r", "--json")
    assert status == 1
    assert [r["against_known"] for r in json.loads(out[0])] == ["CONTRADICTS", "new"]


def test_a_failed_instance_is_shown_and_does_not_stop_the_others(folder, capsys):
    (folder / "easy.vnnlib").write_text("(assert (>= Y_0 100))")
    status, out, _ = run(capsys, "--instances", folder / "list.csv", "--results", folder / "r", "--json")
    first, second = json.loads(out[0])
    assert status == 1
    assert first["verdict"] == "error"
    assert "used before it is declared" in first["error"]
    assert second["verdict"] == "violated"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "lists no instances"),
        ("easy.onnx,easy.vnnlib\n", "line 1: expected network"),
        ("easy.onnx,easy.vnnlib,-1\n", "line 1: expected network"),
    ],
)
def test_a_bad_list_is_refused(folder, rows, message):
    (folder / "list.csv").write_text(rows)
    with pytest.raises(instances.ListFailure, match=message):
        instances.read(folder / "list.csv")


def test_missing_files_of_a_list_and_bad_known_results_are_named(folder):
    (folder / "list.csv").write_text("easy.onnx,gone.vnnlib,5\n")
    with pytest.raises(FileNotFoundError, match=r"line 1: neither .*gone.vnnlib nor gone.vnnlib.gz"):
        instances.read(folder / "list.csv")
    (folder / "known_results.csv").write_text("onnx,vnnlib,verdict\n")
    with pytest.raises(instances.ListFailure, match="has no column consensus"):
        instances.read(folder / "list.csv")


@pytest.mark.skipif("CERTPRUNE_VNNCOMP" not in os.environ, reason="CERTPRUNE_VNNCOMP does not point at benchmarks")
def test_the_small_benchmark_is_solved_completely(tmp_path, capsys):
    listed = Path(os.environ["CERTPRUNE_VNNCOMP"]) / "test" / "test_instances.csv"
    status, out, _ = run(capsys, "--instances", listed, "--timeout", 20, "--results", tmp_path, "--json")
    assert status == 0
    assert [r["against_known"] for r in json.loads(out[0])] == ["agrees"] * 5
