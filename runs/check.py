"""Verdicts on record, put to the test again: ``python -m runs.compare check``.

Every HOLDS is attacked (a dense grid of parameters, refined, for semantic perturbations; PGD with restarts for boxes
and balls; random members for all), every VIOLATED is broken again in a plain forward pass at the counterexample on
record, certified margins are compared with the smallest margin that was found, and auto-LiRPA bounds the first images a
second time. Margins are computed here from the outputs alone, by other code than the verifiers'. What contradicts a
verdict is a *break*.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import certify
import models
from certify import lirpa
from certify.arithmetic import full_float32
from certify.perturbations import L2, AffineFamily, Box, Linf
from runs import car_sampling, checked, deviations, measure, witness
from runs.cell import Cell, from_dict, recorded_by_state
from runs.checked import Effort, Finding, OutOfTime
from runs.packages import ours
from runs.reattack import Double, Question, margins_at, require_members, search
from runs.store import Record, Slot, Store, file_sha256, read_lines
from runs.suites import car

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

CROSS_SECONDS = 10.0  # for auto-LiRPA, a perturbation
REPLAY_SECONDS = 10.0  # for the verifier to find a counterexample that is not on record
CROWN_RELUS = 4096  # its CROWN takes minutes an image on larger networks


class Unreadable(RuntimeError):
    """The files of a cell are missing, damaged, or do not belong together."""


def examine(
    q: Question, rows: Sequence[Mapping[str, Any]], cell: Cell, effort: Effort, tick: Callable[[], None], out: Finding
) -> None:
    """Put the verdicts ``rows`` on the images of ``q`` to the test; what comes out is added to ``out``."""
    status = [row["status"] for row in rows]
    holds = torch.tensor([i for i, s in enumerate(status) if s == "holds"], dtype=torch.int64, device=q.x.device)
    broken = torch.tensor([i for i, s in enumerate(status) if s == "violated"], dtype=torch.int64, device=q.x.device)
    margins: dict[int, float] = {}
    double = Double(q.model)
    if len(holds):
        own = q.at(holds)
        worst = search(own, effort.probes, tick)
        out.probes += worst.probes
        exact = double.margins(own, worst.inputs)
        for place, i in enumerate(holds.tolist()):
            margins[i] = float(worst.margin[place])
            _judge_holds(rows[i], margins[i], float(exact[place]), float(own.slack[place]), out)
        out.holds += len(holds)
    if len(broken):
        own = q.at(broken)
        plain = margins_at(own, own.x.unsqueeze(0))[0]
        for place, i in enumerate(broken.tolist()):
            one = own.at(torch.tensor([place], device=q.x.device))
            margins[i] = float(plain[place])
            if margins[i] > 0 or isinstance(q.p, Box):
                margins[i] = _judge_violated(one, rows[i], cell, effort, tick, out)
            tick()
            out.violated += 1
    for i, row in enumerate(rows):
        if "deviation_at" in row:
            _judge_deviation(q.at(torch.tensor([i], device=q.x.device)), row, margins.get(i), out)
    chosen = [*holds.tolist()[: effort.cross], *broken.tolist()[: effort.cross]]
    if chosen:
        _cross(q, chosen, rows, margins, tick, out)


def _named(row: Mapping[str, Any]) -> str:
    state = f", state {row['state']}" if "state" in row else ""
    return f"image {row['index']} under {row['perturbation']}{state}"


def _judge_holds(row: Mapping[str, Any], found: float, exact: float, slack: float, out: Finding) -> None:
    """A HOLDS against the smallest margin found, in the network's own arithmetic and in float64."""
    if found <= 0 and exact <= 0:
        out.breaks.append(f"{_named(row)} HOLDS on record, but the margin is {exact:.3g} at a member of the set")
    elif found <= 0:
        out.rounding += 1
    elif row["lower"] is not None and found < row["lower"] - slack:
        out.breaks.append(f"{_named(row)} has the certified margin {row['lower']:.6g}, but {found:.6g} at a member")


def _judge_deviation(q: Question, row: Mapping[str, Any], margin: float | None, out: Finding) -> None:
    """The enclosure of the largest deviation against what was found, and against its own arg max."""
    slack = float(q.slack[0])
    at = torch.tensor(row["deviation_at"], dtype=q.x.dtype, device=q.x.device)
    image = q.p.apply(q.x, at if len(at) == 1 else at.unsqueeze(0))
    there = q.delta - float(margins_at(q, image.unsqueeze(0))[0, 0])
    out.probes += 1
    if there < row["deviation_low"] - slack:
        out.breaks.append(
            f"{_named(row)} should move by {row['deviation_low']:.6g} px at its worst parameter, not by {there:.6g}"
        )
    high = row["deviation_high"]
    if high is not None and margin is not None and q.delta - margin > high + slack:
        out.breaks.append(f"{_named(row)} should move by at most {high:.6g} px, but moves by {q.delta - margin:.6g}")


def _judge_violated(
    q: Question, row: Mapping[str, Any], cell: Cell, effort: Effort, tick: Callable[[], None], out: Finding
) -> float:
    """A VIOLATED against its counterexample on record, else against one that is looked for; the smallest margin found.

    Looking for one (in records that keep none) is a search, then the verifier itself with `REPLAY_SECONDS` or what the
    cell gave it, whichever is longer. Not to find one proves nothing; a proof that there is none is a break.
    """
    tolerated = 0.1 * float(q.slack[0])
    inputs = witness.given(row, q.p, q.x)
    if inputs is not None:
        require_members(q, inputs)
        out.probes += 1
        found = float(margins_at(q, inputs.unsqueeze(0))[0, 0])
        if found > tolerated:
            out.breaks.append(f"{_named(row)} is VIOLATED on record, but its counterexample has the margin {found:.3g}")
        return found
    worst = search(q, effort.probes, tick)
    out.probes += worst.probes
    found = float(worst.margin[0])
    if found <= tolerated:
        return found
    method = "line" if cell.verifier.method == deviations.METHOD else cell.verifier.method
    budget = certify.Budget(seconds=max(REPLAY_SECONDS, cell.verifier.seconds or 0.0))
    again = certify.verify(q.model, q.x, q.spec, q.p, method=method, budget=budget, seed=int(row["index"]))
    if int(again.status[0]) == certify.Status.VIOLATED:
        require_members(q, again.counterexamples.to(q.x))
        out.probes += 1
        found = min(found, float(margins_at(q, again.counterexamples.to(q.x).unsqueeze(0))[0, 0]))
    elif int(again.status[0]) == certify.Status.HOLDS:
        out.breaks.append(f"{_named(row)} is VIOLATED on record, but now proved to hold by {again.method}")
    if found > tolerated:
        out.lost += 1
    return found


def _cross(
    q: Question,
    chosen: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    margins: Mapping[int, float],
    tick: Callable[[], None],
    out: Finding,
) -> None:
    """Bounds by auto-LiRPA on a few images: it may prove less, but never more than what was found allows.

    CROWN on networks that are small enough for it, else intervals.
    """
    if not (lirpa.available() and isinstance(q.p, Linf | L2 | Box | AffineFamily)):
        return
    until = time.monotonic() + CROSS_SECONDS
    method = "CROWN" if measure.relus(q.model, q.x) <= CROWN_RELUS else "IBP"
    for i in chosen:
        if time.monotonic() > until:
            return
        one = q.at(torch.tensor([i], device=q.x.device))
        linear = one.spec.rows(one.reference)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about its own use of torch
                low, _ = lirpa.bounds(q.model, one.x, one.p, method, linear.C)
        except (RuntimeError, TypeError, ValueError):  # a network or perturbation that the library cannot express
            return
        lower = float((low + torch.as_tensor(linear.d)).amin())
        if rows[i]["status"] == "holds":
            out.crossed += 1
            out.confirmed += lower > 0
        if lower > margins[i] + float(one.slack[0]):
            out.breaks.append(
                f"{_named(rows[i])} has the margin {margins[i]:.6g} at a member, but at least {lower:.6g} by auto-LiRPA"
            )
        tick()


@dataclass(frozen=True)
class Checker:
    """Checks cells on one device, with data sets from ``data_dir``."""

    store: Store
    device: torch.device
    data_dir: Path | None
    effort: Effort

    @full_float32()
    def check(self, record: Record, tick: Callable[[], None], tell: Callable[[str, int, int], None]) -> Finding:
        """Check everything on record of one cell.

        Args:
            record: the cell's record, finished.
            tick: called now and then; raises OutOfTime when the budget is spent.
            tell: called as tell(stage, done, total).
        """
        out = Finding()
        try:
            if from_dict(record["cell"]).verifier.method == car.METHOD:
                self._redraw(record, tick, out)
                return out
            for done, (q, rows, total) in enumerate(self._questions(record)):
                tell(f"re-attacking {rows[0]['perturbation']}", done, total)
                tick()
                examine(q, rows, from_dict(record["cell"]), self.effort, tick, out)
            out.complete = True
        except OutOfTime:
            pass
        except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:
            out.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return out

    def _questions(self, record: Record) -> Iterator[tuple[Question, list[dict[str, Any]], int]]:
        """Each network and perturbation of a cell, with its verdicts in the order of the images.

        Raises:
            Unreadable: files are missing or damaged, or the images are not those that were certified.
        """
        cell = from_dict(record["cell"])
        slot = self.store.slot(cell)
        _intact(slot)
        groups = _verdicts(slot, record)
        pack = self._images(record, cell)
        x, y = pack.tensors(torch.arange(min(cell.verifier.images, len(pack))), device=self.device)
        perturbations = {p.label: measure.perturbation(p) for p in cell.perturbations}
        loaded: tuple[int | None, nn.Module] | None = None
        for (state, label), rows in groups.items():
            if loaded is None or loaded[0] != state:
                loaded = state, self._model(slot, state)
            model = loaded[1]
            with torch.no_grad():
                reference = model(x)
            labels = y if pack.task == "classification" else None
            yield Question(model, perturbations[label], x, reference, labels, cell.verifier.delta), rows, len(groups)

    def _redraw(self, record: Record, tick: Callable[[], None], out: Finding) -> None:
        """Draw anew for every certificate of a cell that was certified by sampling; what comes out is added to `out`.

        Raises:
            Unreadable: as `_questions`.
        """
        cell = from_dict(record["cell"])
        slot = self.store.slot(cell)
        _intact(slot)
        pack, model = self._images(record, cell), self._model(slot, None)
        x, y = pack.tensors(torch.arange(min(cell.verifier.images, len(pack))), device=self.device)
        named = {p.label: p for p in cell.perturbations}
        for (_, label), rows in _verdicts(slot, record).items():
            breaks, drawn = car_sampling.redraw(
                model, x, y, named[label], pack, cell.verifier, rows, self.data_dir, self.effort.probes, tick
            )
            out.breaks += breaks
            out.probes += drawn
            out.holds += sum(row["status"] == "holds" for row in rows)
        out.complete = True

    def _images(self, record: Record, cell: Cell) -> Any:
        """The test images of a cell. Raises Unreadable where they are not those that were certified."""
        from runs.execute import test_images

        data = cell.data
        pack = ours("datasets").load(data.name, self.data_dir, "test", limit=test_images(cell), **data.options)
        wanted = record["data"]["fingerprints"]["test"]
        if pack.fingerprint != wanted:
            raise Unreadable(
                f"the test images of {cell.data.name} are not those that were certified (fingerprint "
                f"{pack.fingerprint[:12]}, on record {wanted[:12]}); run the cell again with --force"
            )
        return pack

    def _model(self, slot: Slot, state: int | None) -> nn.Module:
        if state is None:
            return models.load(slot.model_path, device=self.device)
        from runs import nrs_states

        return nrs_states.load(slot.path, state, self.device)[0]


def _intact(slot: Slot) -> None:
    """Raise Unreadable unless every file that training left is as it was."""
    history = slot.history()
    if not history or history[-1].get("event") != "trained":
        raise Unreadable(
            f"{slot.path / 'history.jsonl'} is missing or damaged; run the same command again with --force"
        )
    for name, wanted in history[-1].get("files", {}).items():
        path = slot.path / name
        state = "missing" if not path.is_file() else "damaged" if file_sha256(path) != wanted else None
        if state is not None:
            raise Unreadable(f"{path} is {state}; restore it, or run the same command again with --force")


def _verdicts(slot: Slot, record: Record) -> dict[tuple[int | None, str], list[dict[str, Any]]]:
    """The verdicts by state and perturbation, which must be as many as the record says, and say the same."""
    path = slot.path / "examples.jsonl"
    groups: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for row in read_lines(path)[0]:
        if "event" not in row:
            groups.setdefault((row.get("state"), row["perturbation"]), []).append(row)
    by_state = recorded_by_state(slot.cell.pruning)
    results = {
        (state["index"] if by_state else None, result["label"]): result
        for state in (record["states"] if by_state else [record])
        for result in state["results"]
    }
    for key, result in results.items():
        rows = sorted(groups.get(key, []), key=lambda row: int(row["index"]))
        counts = {name: sum(row["status"] == name for row in rows) for name in ("holds", "violated")}
        if [row["index"] for row in rows] != list(range(result["images"])):
            raise Unreadable(
                f"{path} holds {len(rows)} of {result['images']} verdicts under {key[1]}: it is damaged; run the same "
                "command again with --force"
            )
        if any(counts[name] != result[name] for name in counts):
            raise Unreadable(
                f"{path} and the record disagree on the verdicts under {key[1]}; run it again with --force"
            )
        groups[key] = rows
    return {key: groups[key] for key in results}


def run(checker: Checker, records: Sequence[Record], seconds: float | None, console: Console) -> list[Finding]:
    """Check finished records one after another, a line each, for at most so many seconds; ``check.json`` is kept."""
    from rich.progress import Progress as Bars

    until = math.inf if seconds is None else time.monotonic() + seconds
    findings: list[Finding] = []

    def tick() -> None:
        if time.monotonic() > until:
            raise OutOfTime

    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        everything = bars.add_task("cells", total=len(records))
        for number, record in enumerate(records, 1):
            label = from_dict(record["cell"]).label
            bar = bars.add_task(label, total=None)

            def tell(stage: str, done: int, total: int, bar: TaskID = bar, label: str = label) -> None:
                bars.update(bar, description=f"{label} · {stage}", completed=done, total=total)

            began = time.monotonic()
            found = checker.check(record, tick, tell)
            findings.append(found)
            checked.save(checker.store.root, record, found, checker.effort)
            bars.remove_task(bar)
            bars.advance(everything)
            bars.console.print(
                f"[{number}/{len(records)}] {label} ({time.monotonic() - began:.1f} s): {found.line()}",
                style="red" if found.breaks or found.problems else None,
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            if time.monotonic() > until:
                break
    return findings
