"""Methods, perturbations, data sets and verifiers from outside the tree."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import certify
import datasets
import methods
from certify import dispatch
from datasets import registry as sources
from runs import cell as cells
from runs import compare, measure, plugins
from runs.packages import ROOT
from runs.plugins import PluginError
from runs.store import Store
from runs.suites import Selection, plan

WHOLE = '''
import dataclasses
import certify, datasets, torch
from certify.perturbations import AffineFamily

__version__ = "1.5"

class Fade(AffineFamily):
    """The right half of the image darkens."""
    name, clip = "fade", True
    def __init__(self, eps):
        self.eps = eps
    def describe(self):
        return f"Fade({self.eps})"
    def select(self, index, n):
        return self
    def check(self, x):
        assert x.ndim == 4
    def directions(self, x):
        half = torch.zeros_like(x)
        half[..., x.shape[-1] // 2:] = -1
        return half.unsqueeze(1)
    def limits(self, x):
        high = torch.full((len(x), 1), self.eps, dtype=x.dtype, device=x.device)
        return torch.zeros_like(high), high

def tiny(request):
    """Bright images are of class 1, dark ones of class 0."""
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[request.split])
    y = torch.arange(60) % 2
    images = torch.randint(0, 60, (60, 8, 8, 1), generator=generator) + 150 * y.reshape(-1, 1, 1, 1)
    return datasets.Pack("tiny", request.split, images.to(torch.uint8), y, ("dark", "bright"))

def by_line(model, x, spec, p, budget, seed):
    return certify.verify(model, x, spec, p, method="line", budget=budget, seed=seed)

def register(registry):
    registry.perturbation("fade", Fade, "the right half darkens by up to the magnitude")
    registry.dataset(datasets.Source("tiny", "dark and bright images", tiny))
    registry.verifier("by_line", by_line, "the exact verifier under another name")
'''


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Put every registry back, and look for modules in the test's folder."""
    tables: list[dict[str, Any]] = [
        methods._OUTSIDE,
        cells.PERTURBATIONS,
        cells.OUTSIDE,
        sources.SOURCES,
        dispatch.OUTSIDE,
        plugins._LOADED,
        plugins._VERIFIERS,
        plugins._METHODS,
    ]
    kept = [dict(table) for table in tables]
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for table, content in zip(tables, kept):
        table.clear()
        table.update(content)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def readme_plugin() -> str:
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "runs" / "README.md").read_text(), flags=re.S)
    return str(code)


def write(folder: Path, name: str, code: str) -> str:
    (folder / f"{name}.py").write_text(code)
    return name


ARGUMENTS = [
    "--preset", "smoke", "--plugin", "outside_lamp", "--plugin", "outside_whole", "--methods", "dense", "lamp",
    "--trainings", "natural", "--datasets", "tiny", "--perturbations", "fade:0.3", "linf:0.01", "--images", "12",
    "--threads", "1", "--export",
]  # fmt: skip


def test_everything_from_outside_takes_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "outside_lamp", readme_plugin())
    write(tmp_path, "outside_whole", WHOLE)
    results = ["--results", str(tmp_path / "results")]
    assert compare.main([*ARGUMENTS, *results, "--engine", "serial"]) == 0
    shown = capsys.readouterr().out
    assert "tiny (640 training images) · cnn7_nrs ×0.25 · fade 0.3" in shown
    records = Store(tmp_path / "results").scan().records
    assert sorted(r["cell"]["pruning"]["method"] for r in records) == ["dense", "lamp"]
    lamp = next(r for r in records if r["cell"]["pruning"]["method"] == "lamp")
    assert lamp["environment"]["plugins"] == {"outside_lamp": None, "outside_whole": "1.5"}
    assert lamp["mask"]["density"] == pytest.approx(0.5, abs=0.01)
    assert dict(lamp["cell"]["pruning"]["settings"])["scope"] == "global"  # the preset's, which its configuration has
    fade = next(r for r in lamp["results"] if r["kind"] == "fade")
    assert fade["clean"] > 0.25  # two classes, trained for a few epochs
    assert fade["holds"] + fade["violated"] == 12  # an affine family is decided exactly
    check = [
        "check",
        *results,
        "--plugin",
        "outside_lamp",
        "--plugin",
        "outside_whole",
        "--probes",
        "50",
        "--cross",
        "0",
    ]
    assert compare.main(check) == 0
    assert "no break" in capsys.readouterr().out


@pytest.mark.slow
def test_worker_processes_load_plugins_too(tmp_path: Path) -> None:
    write(tmp_path, "outside_lamp", readme_plugin())
    write(tmp_path, "outside_whole", WHOLE)
    command = [sys.executable, "-m", "runs.compare", *ARGUMENTS, "--perturbations", "fade:0.3", "--verifier", "by_line"]
    for engine, workers in (("processes", "2"), ("serial", "1")):
        place = ["--results", str(tmp_path / engine), "--engine", engine, "--workers", workers]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        run = subprocess.run([*command, *place], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    without = Store(tmp_path / "serial").scan()
    assert without.records == []
    assert "unknown perturbation 'fade'" in without.problems[0]
    assert "--plugin" in without.problems[0]
    plugins.load(["outside_whole"])
    both = [Store(tmp_path / name).scan().records for name in ("processes", "serial")]
    assert [len(records) for records in both] == [2, 2]
    bits = [[r["results"][0]["verified_bits"] for r in records] for records in both]
    assert bits[0] == bits[1]
    assert {r["results"][0]["method"] for r in both[0]} == {"by_line"}


def test_the_method_of_the_readme_ranks_as_lamp_does(tmp_path: Path) -> None:
    write(tmp_path, "outside_lamp", readme_plugin())
    plugins.load(["outside_lamp"])
    assert len(readme_plugin().splitlines()) <= 40
    module = sys.modules["outside_lamp"]
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    flat = weight.flatten().tolist()
    expected = [w * w / sum(v * v for v in flat if v * v >= w * w) for w in flat]
    assert module.lamp(weight).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert methods.get("lamp") == (module.LAMP, module.LAMPConfig)
    assert "lamp" in methods.names()
    cell = plan("arena", "smoke", Selection(methods=("lamp",))).cells[0]
    assert (cell.pruning.method, cell.pruning.ratio) == ("lamp", 0.5)


def test_names_from_outside_are_listed_and_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "outside_whole", WHOLE)
    assert compare.main(["--plugin", "outside_whole", "--list"]) == 0
    shown = capsys.readouterr().out
    for line in ("the right half darkens", "dark and bright images", "the exact verifier under another name"):
        assert line in shown
    assert compare.main(["--plugin", "outside_whole", "--verifier", "by_lin", "--dry-run"]) == 2
    assert "Did you mean by_line" in capsys.readouterr().err


def test_a_plugin_is_loaded_once(tmp_path: Path) -> None:
    write(tmp_path, "outside_whole", WHOLE)
    plugins.load(["outside_whole", "outside_whole:register"])
    plugins.load(["outside_whole"])
    assert plugins.loaded() == {"outside_whole": "1.5"}


def test_installed_plugins_are_found_by_their_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "outside_lamp", readme_plugin())
    info = tmp_path / "some_lamp-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-lamp\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[certprune.plugins]\nlamp = outside_lamp:register\n")
    assert [point.name for point in importlib.metadata.entry_points(group=plugins.GROUP)] == ["lamp"]
    plugins.load()
    assert plugins.loaded() == {"outside_lamp": "2.0"}
    (info / "entry_points.txt").write_text("[certprune.plugins]\nlamp = outside_gone:register\n")
    with pytest.raises(PluginError, match=r"outside_gone.*installed by some-lamp: repair or uninstall"):
        plugins.load()


GOOD = """
import dataclasses
@dataclasses.dataclass(frozen=True)
class Config:
    ratio: float = 0.5
    epochs: int = 1
    training: object = None
@dataclasses.dataclass(frozen=True)
class Method:
    config: Config
    def fit(self, model, batches, *, val=None, loss=None, seed=0, device=None, checkpoint=None, callbacks=()): ...
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", "cannot import plug-in 'bad': No module named 'nothing_of_this_name'"),
        ("1 / 0", "'bad' fails on import: ZeroDivisionError: division by zero"),
        ("x = 1", r"plug-in 'bad' has no function register\(registry\) \(looked in .*bad.py\)"),
        ("def register(registry): registry.nothing()", "plug-in bad fails to register: AttributeError"),
        (GOOD + "def register(r): r.method('imp', Method, Config, '')", "there is a method 'imp' already, built in"),
        (GOOD + "def register(r): r.method('My Method', Method, Config, '')", "'My Method' is no name for a method"),
        (GOOD + "def register(r): r.method('m', Method, dict, '')", "configuration of method 'm' must be a dataclass"),
        (GOOD + "def register(r): r.method('m', Config, Config, '')", r"class of method 'm' has no fit\(model"),
        (
            GOOD + "class Old:\n    def fit(self, model, batches, seed): ...\n"
            "def register(r): r.method('m', Old, Config, '')",
            "fit of method 'm' takes no val, no loss, no device, no checkpoint, no callbacks",
        ),
        (
            GOOD + "@dataclasses.dataclass\nclass Less:\n    ratio: float = 0\n"
            "def register(r): r.method('m', Method, Less, '')",
            "Less has no field epochs and no training",
        ),
        ("def register(r): r.perturbation('linf', float, '')", "there is a perturbation 'linf' already, built in"),
        ("def register(r): r.perturbation('p', 3, '')", "'p' must be a function of 1, got int"),
        (
            "def register(r): r.verifier('v', lambda model: 0, '')",
            r"must be callable with 6 arguments, but is \(model\)",
        ),
        ("def register(r): r.verifier('crown', print, '')", "there is a verifier 'crown' already, built in"),
        ("def register(r): r.dataset('digits')", "registered as a datasets.Source, got str"),
        (
            "def register(r):\n    r.perturbation('p', abs, '')\n    r.perturbation('p', abs, '')",
            "registers the perturbation 'p' twice",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, code: str, message: str) -> None:
    before = (methods.names(), tuple(cells.PERTURBATIONS), tuple(datasets.names()), tuple(dispatch.OUTSIDE))
    write(tmp_path, "bad", code)
    with pytest.raises(PluginError, match=message):
        plugins.load(["bad"])
    assert (methods.names(), tuple(cells.PERTURBATIONS), tuple(datasets.names()), tuple(dispatch.OUTSIDE)) == before
    assert plugins.loaded() == {}


def test_two_plugins_that_clash_are_both_named(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path, name, GOOD + "def register(r): r.method('mine', Method, Config, 'x')")
    write(tmp_path, "half", "def register(r):\n    r.perturbation('new', abs, '')\n    r.perturbation('l2', abs, '')")
    plugins.load(["first"])
    with pytest.raises(PluginError, match="plug-in second: there is a method 'mine' already, from plug-in first"):
        plugins.load(["second"])
    with pytest.raises(PluginError, match="'l2' already"):
        plugins.load(["half"])
    assert "new" not in cells.PERTURBATIONS  # nothing of a plug-in that fails half way


def test_a_missing_plugin_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--plugin", "no_such_plugin", "--dry-run"]) == 2
    assert "it must be installed, or lie in the current folder or on PYTHONPATH" in capsys.readouterr().err


def test_a_perturbation_that_makes_something_else_is_named(tmp_path: Path) -> None:
    write(tmp_path, "odd", "def register(r): r.perturbation('odd', float, '')")
    plugins.load(["odd"])
    with pytest.raises(TypeError, match=r"'odd' made float, expected a certify\.Perturbation"):
        measure.perturbation(cells.Perturb("odd", 0.5))


def network() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
    return net


def certificate(status: list[int], inputs: torch.Tensor) -> certify.Certificate:
    n = len(status)
    nothing = torch.zeros(n)
    return certify.Certificate(torch.tensor(status), nothing, nothing, inputs, {}, "mine")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "returned NoneType, expected a certify.Certificate"),
        (lambda x: certificate([0], x[:1]), "returned 1 statuses for 2 images"),
        (lambda x: certificate([0, 7], x), "none of certify.Status"),
        (lambda x: certificate([0, 1], x), "image 1 of its chunk VIOLATED, but .* does not break the property"),
        (lambda x: certificate([0, 1], x + 0.5), "image 1 of its chunk VIOLATED, but .* lies outside"),
        (lambda x: dataclasses.replace(certificate([0, 0], x), lower=torch.zeros(5)), r"returned lower bounds \(5,\)"),
        (lambda x: certificate([0, 0], x[..., :1]), r"and counterexamples \(2, 1, 1, 1\) for images \(2, 1, 1, 2\)"),
    ],
)
def test_answers_of_a_verifier_are_checked(answer: Any, message: str) -> None:
    dispatch.register("mine", lambda model, x, spec, p, budget, seed: answer(x))
    x = torch.tensor([[[[0.2, 0.1]]], [[[0.3, 0.1]]]])
    with pytest.raises((TypeError, ValueError), match=message):
        certify.verify(network(), x, certify.Classification(torch.tensor([0, 0])), certify.Linf(0.05), method="mine")


def test_a_counterexample_must_be_a_member_of_the_set_itself() -> None:
    """The corner of the box around a ball, or pixels that move apart under brightness, are none."""
    x = torch.tensor([[[[0.2, 0.1]]]])
    corner = torch.tensor([[[[0.11, 0.19]]]])
    spec = certify.Classification(torch.tensor([0]))
    at: list[torch.Tensor | None] = [None]
    dispatch.register(
        "mine", lambda *_: dataclasses.replace(certificate([1], corner), parameters=at[0])
    )  # in the box of radius 0.1
    with pytest.raises(ValueError, match="lies outside of the perturbation"):
        certify.verify(network(), x, spec, certify.L2(0.1), method="mine")
    with pytest.raises(ValueError, match=r"no parameters of Brightness\(0\.1\)"):
        certify.verify(network(), x, spec, certify.Brightness(0.1), method="mine")
    at[0] = torch.tensor([[0.05]])
    with pytest.raises(ValueError, match="lies outside of the perturbation"):
        certify.verify(network(), x, spec, certify.Brightness(0.1), method="mine")


def test_answers_of_a_verifier_come_through_chunk_by_chunk() -> None:
    seen: list[tuple[int, int]] = []

    def mine(model: Any, x: torch.Tensor, spec: Any, p: Any, budget: Any, seed: int) -> certify.Certificate:
        seen.append((len(x), seed))
        return certify.verify(model, x, spec, p, method="ibp", budget=budget, seed=seed)

    dispatch.register("mine", mine)
    with pytest.raises(ValueError, match="there is a verifier 'mine' already"):
        dispatch.register("mine", mine)
    x = torch.rand(5, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    spec = certify.Classification(torch.zeros(5, dtype=torch.int64))
    eps = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    found = certify.verify(network(), x, spec, certify.Linf(eps), method="mine", chunk=2)
    expected = certify.verify(network(), x, spec, certify.Linf(eps), method="ibp")
    assert found.status.tolist() == expected.status.tolist()
    assert found.method == "mine"
    assert seen == [(2, 0), (2, 2), (1, 4)]


def test_a_data_set_from_outside_takes_the_place_of_the_default() -> None:
    plugins._LOADED["p"] = plugins.Loaded(None, {"data set": ("own",)})
    arena = plan("arena", "quick", Selection())
    first = arena.cells[0].data
    widened = plugins.widen(arena.preset, None, ["own", "own:big"])
    own = [block for block in widened.blocks if block.data.name == "own"]
    assert len(own) == sum(block.data.name == first.name for block in arena.preset.blocks)
    assert own[0].data == type(first)("own", first.limit, first.val_limit, first.augment)
    assert plugins.widen(arena.preset, ["dense"], [first.name]) == arena.preset


def test_the_factory_loads_plugins_first(tmp_path: Path) -> None:
    write(tmp_path, "outside_whole", WHOLE)
    made = plugins.Prepared(("outside_whole",), lambda: SimpleNamespace(known=tuple(dispatch.OUTSIDE)))()  # type: ignore[arg-type,return-value]
    assert made.known == ("by_line",)  # type: ignore[attr-defined]
