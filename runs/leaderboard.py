"""From records to tables: one table per data set, network, perturbation and verifier.

A row is a method at a sparsity under a training, over its seeds.

Nothing here runs a network. Every number comes from the records, at full precision.
"""

from __future__ import annotations

import statistics as stdlib_statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runs import paper, ranking
from runs.cell import Cell, Perturb, Verifier, digest, from_dict
from runs.ranking import Entrant, Ranking
from runs.statistics import Interval, MeanSd, Paired, clopper_pearson, holm, mean_sd, sign_test
from runs.store import DONE, Record

RANKING_SEEDS = 3
VERDICTS = ("holds", "violated", "unknown", "timeout")


@dataclass(frozen=True)
class Counts:
    """Verdicts summed over the seeds of a row."""

    holds: int
    violated: int
    unknown: int
    timeout: int


@dataclass(frozen=True)
class Row:
    """One line of a leaderboard. Shares are fractions in [0, 1]; ``clean`` is a mean error in pixels for keypoints.

    ``verified`` counts images that hold and, for classification, are classified correctly. ``interval`` is the 95 %
    Clopper-Pearson interval of the mean count over the ``images`` test images: seeds do not count as extra images.
    ``sampled`` counts images that are classified correctly and certified by random draws. ``parameters_left`` and
    ``flops_executed`` are shares after pruned channels are removed, ``budget`` the epochs of training in all.
    """

    method: str
    ratio: float
    training: str
    note: str
    seeds: tuple[int, ...]
    images: int
    errors: tuple[str, ...]
    printed: dict[str, Any]
    clean: MeanSd | None = None
    attacked: MeanSd | None = None
    verified: MeanSd | None = None
    interval: Interval | None = None
    counts: Counts | None = None
    versus_dense: Paired | None = None
    versus_dense_difference: float | None = None
    versus_dense_p: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    unstable: MeanSd | None = None
    parameters_left: float | None = None
    flops_nonzero: float | None = None
    flops_executed: float | None = None
    sampled: MeanSd | None = None
    budget: int | None = None

    @property
    def failed(self) -> bool:
        return self.verified is None

    @property
    def ranked(self) -> bool:
        """Whether it has the seeds that an order needs."""
        return not self.failed and len(self.seeds) >= RANKING_SEEDS


@dataclass(frozen=True)
class Table:
    """A leaderboard: what its rows have in common, and the rows in order."""

    data: str
    network: str
    perturbation: Perturb
    verifier: Verifier
    task: str
    soundness: tuple[str, ...]
    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.data} · {self.network} · {self.perturbation.label}"

    @property
    def ordered(self) -> int:
        """How many rows, the first ones, have at least three seeds, so that their order means something."""
        return sum(row.ranked for row in self.rows)

    @property
    def ranking_note(self) -> str:
        """Why there is no ranking, or what the order means."""
        fewer = [row for row in self.rows if not row.failed and not row.ranked]
        if not self.ordered:
            if not fewer:
                return "No finished rows."
            least, most = min(len(row.seeds) for row in fewer), max(len(row.seeds) for row in fewer)
            seeds = "one seed" if least == 1 else f"{least} seeds"
            return f"{seeds}: no ranking" if least == most else f"{seeds} in some rows: no ranking"
        order = f"Rows of at least {RANKING_SEEDS} seeds are ordered" if fewer else "Rows are ordered"
        order += " by mean verified share; "
        order += (
            "who is ahead of whom is in the rankings below."
            if self.rankings
            else "no two are matched, so that nothing is ranked."
        )
        return order + (f" The last {len(fewer)}, of fewer seeds, are in no order." if fewer else "")

    @property
    def comparable(self) -> bool:
        return any(row.printed["comparable"] for row in self.rows)

    @property
    def paper_note(self) -> str | None:
        """One line in place of a column in which nothing is comparable; None where the column is shown."""
        if self.comparable:
            return None
        near = [row for row in self.rows if row.printed["printed"] is not None]
        if not near:
            return "Papers: none prints a number for these rows."
        row = min(near, key=lambda item: len(item.printed["reason"]))
        return (
            f"Papers: n/c (not comparable) in every row. The closest is {row.method}, {row.printed['printed']:.1%} in "
            f"{row.printed['source']}; it differs in: {row.printed['reason']}."
        )


@dataclass(frozen=True)
class _Measured:
    """One cell under one perturbation."""

    cell: Cell
    record: Record
    result: dict[str, Any] | None


def build(records: Iterable[Record]) -> list[Table]:
    """Leaderboards from records, in the order in which the records come.

    Raises:
        ValueError: a record's cell cannot be read.
    """
    tables: dict[tuple[Any, ...], dict[str, list[_Measured]]] = {}
    for record in records:
        cell = from_dict(record["cell"])
        results = {(r["kind"], r["magnitude"]): r for r in record.get("results", ())}
        row_id = digest({k: v for k, v in cell.to_dict().items() if k not in ("seed", "perturbations")})
        for perturbation in cell.perturbations:
            result = results.get((perturbation.kind, perturbation.magnitude)) if record["status"] == DONE else None
            name = (cell.data, cell.network, perturbation, cell.verifier)
            tables.setdefault(name, {}).setdefault(row_id, []).append(_Measured(cell, record, result))
    return [_table(perturbation, list(rows.values())) for (_, _, perturbation, _), rows in tables.items()]


def _table(perturbation: Perturb, groups: Sequence[Sequence[_Measured]]) -> Table:
    cell = groups[0][0].cell
    tasks = [m.record["data"]["task"] for group in groups for m in group if m.result is not None]
    soundness = {m.result["soundness"] for group in groups for m in group if m.result is not None}
    dense: dict[str | None, Sequence[_Measured]] = {}
    for group in groups:
        if group[0].cell.pruning.method == "dense":
            dense |= {_training_id(group): group, _budget_id(group): group}
    dense.pop(None, None)
    labels = [_name(group[0].cell) for group in groups]
    rows = []
    for group, label in zip(groups, labels):
        twins = [other for other, name in zip(groups, labels) if name == label and other is not group]
        note = _settings_note(group[0].cell) if twins else ""
        reference = dense.get(_training_id(group)) or dense.get(_budget_id(group))
        rows.append(_row(group, reference, perturbation, note))
    rows = _adjusted(rows)
    entrants = [entrant for group, row in zip(groups, rows) if (entrant := _entrant(group, row)) is not None]
    # Rows without the seeds for it stay in the order of the plan, behind the others.
    order = sorted(rows, key=lambda row: (not row.ranked, row.failed, -row.verified.mean if row.ranked else 0.0))  # type: ignore[union-attr]
    return Table(
        cell.data.label, cell.network.label, perturbation, cell.verifier, tasks[0] if tasks else "classification",
        tuple(sorted(soundness)), tuple(order), ranking.build(entrants, RANKING_SEEDS),
    )  # fmt: skip


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    """The rows with p-values adjusted by Holm over those of the same training: they are held against one network."""
    found = list(rows)
    for training in dict.fromkeys(row.training for row in rows):
        places = [i for i, row in enumerate(rows) if row.training == training and row.versus_dense is not None]
        for i, p in zip(places, holm([rows[i].versus_dense.p for i in places])):  # type: ignore[union-attr]
            found[i] = replace(rows[i], versus_dense_p=p)
    return found


def _entrant(group: Sequence[_Measured], row: Row) -> Entrant | None:
    """A finished row as rankings see it, with its verdicts image by image."""
    if row.verified is None or row.parameters_left is None or row.flops_executed is None:
        return None
    bits = {m.cell.seed: m.result["verified_bits"] for m in group if m.result is not None}
    name = row.method + (f" ({row.note})" if row.note else "")
    return Entrant(
        name, row.ratio, row.training, row.budget, row.parameters_left, row.flops_executed, row.verified, bits
    )


def _parameters_left(size: Mapping[str, Any]) -> int:
    """Parameters of a record's network that are not zero, the inputs of removed channels not counted either."""
    return int(min(size["parameters_left"], size.get("parameters_executed", size["parameters"])))


def _name(cell: Cell) -> tuple[str, float, str]:
    return cell.pruning.label, cell.pruning.ratio, cell.training.label


def _training_id(group: Sequence[_Measured]) -> str:
    cell = group[0].cell
    return digest(cell.to_dict()["training"])


def _budget_id(group: Sequence[_Measured]) -> str | None:
    """What rows share that were trained alike for the same epochs in all, however a method divides those up."""
    budget = _budget(group)
    return None if budget is None else digest(group[0].cell.training.in_all(budget))


def _budget(group: Sequence[_Measured]) -> int | None:
    """Epochs of a row in all, None where its records do not say so or disagree."""
    found = {m.record.get("training", {}).get("epochs") for m in group if m.result is not None}
    return found.pop() if len(found) == 1 else None


def _settings_note(cell: Cell) -> str:
    own = [f"{name}={value}" for name, value in (*cell.pruning.settings, *cell.training.settings)]
    return ", ".join([f"epochs={cell.training.epochs}", *own])


def _row(group: Sequence[_Measured], dense: Sequence[_Measured] | None, perturbation: Perturb, note: str) -> Row:
    cell = group[0].cell
    done = [(m, m.result) for m in group if m.result is not None]
    errors = tuple(
        f"seed {m.cell.seed}: {m.record['error']['type']}: {m.record['error']['message']}"
        for m in group
        if m.result is None and m.record.get("error")
    )
    method, ratio, training = _name(cell)
    # A network that ignores its input is certified trivially.
    constant = sum(bool(m.record.get("training", {}).get("collapsed")) for m, _ in done)
    if constant:
        note = ", ".join(filter(None, (note, f"constant predictor in {constant} of {len(done)} seeds")))
    if not done:
        images = cell.verifier.images
        return Row(method, ratio, training, note, (), images, errors, paper.describe(None, 0.0))
    results = [result for _, result in done]
    sizes = [m.record["size"] for m, _ in done]
    sampled = [result["sampled"] for result in results if result.get("sampled") is not None]
    images = min(result["images"] for result in results)
    verified = mean_sd([result["verified"] / result["images"] for result in results])
    unstable = [result["unstable"] for result in results if result["unstable"] is not None]
    difference, test = _versus(group, dense)
    return Row(
        method=method,
        ratio=ratio,
        training=training,
        note=note,
        seeds=tuple(sorted(m.cell.seed for m, _ in done)),
        images=images,
        clean=mean_sd([result["clean"] for result in results]),
        attacked=mean_sd([result["attacked"] / result["images"] for result in results]),
        verified=verified,
        interval=clopper_pearson(min(max(verified.mean, 0.0), 1.0) * images, images),
        counts=Counts(
            *(sum(result[name] for result in results) for name in ("holds", "violated", "unknown", "timeout"))
        ),
        versus_dense=test,
        versus_dense_difference=difference,
        versus_dense_p=None if test is None else test.p,
        seconds=stdlib_statistics.fmean(result["timing"]["seconds_mean"] for result in results),
        peak_mb=max((r["timing"]["peak_mb"] for r in results if r["timing"]["peak_mb"] is not None), default=None),
        unstable=mean_sd(unstable) if unstable else None,
        parameters_left=stdlib_statistics.fmean(_parameters_left(size) / size["parameters"] for size in sizes),
        flops_nonzero=stdlib_statistics.fmean(s["flops_nonzero"] / s["flops"] for s in sizes),
        flops_executed=stdlib_statistics.fmean(s["flops_executed"] / s["flops"] for s in sizes),
        sampled=mean_sd([found["certified"] / found["images"] for found in sampled]) if sampled else None,
        budget=_budget(group),
        printed=paper.describe(paper.compare(cell, perturbation), verified.mean),
        errors=errors,
    )


def _versus(group: Sequence[_Measured], dense: Sequence[_Measured] | None) -> tuple[float | None, Paired | None]:
    """Difference of the verified share to dense under the same training, and a sign test over images.

    Each image counts once: its value is the number of common seeds in which it is verified, so that repeated seeds of
    one image do not pose as independent images.
    """
    if dense is None or group[0].cell.pruning.method == "dense":
        return None, None
    ours = {m.cell.seed: m.result["verified_bits"] for m in group if m.result is not None}
    theirs = {m.cell.seed: m.result["verified_bits"] for m in dense if m.result is not None}
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None, None
    images = min(len(bits) for seed in common for bits in (ours[seed], theirs[seed]))
    differences = [sum((ours[s][i] == "1") - (theirs[s][i] == "1") for s in common) for i in range(images)]
    return sum(differences) / (images * len(common)), sign_test(differences)


def as_dicts(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Rows as flat dictionaries with full-precision values: what the CSV and JSON exports hold."""
    flat = []
    for table in tables:
        for row in table.rows:
            values: dict[str, Any] = {
                "data": table.data,
                "network": table.network,
                "perturbation": table.perturbation.kind,
                "magnitude": table.perturbation.magnitude,
                "verifier": table.verifier.method,
                "task": table.task,
                "method": row.method,
                "sparsity": row.ratio,
                "training": row.training,
                "note": row.note,
                "status": "failed" if row.failed else ("partly failed" if row.errors else "done"),
                "seeds": " ".join(map(str, row.seeds)),
                "images": row.images,
            }
            for name, spread in (
                ("clean", row.clean),
                ("attacked", row.attacked),
                ("verified", row.verified),
                ("sampled", row.sampled),
                ("unstable_relus", row.unstable),
            ):
                values[f"{name}_mean"] = spread.mean if spread else None
                values[f"{name}_sd"] = spread.sd if spread else None
            values["verified_low"] = row.interval.low if row.interval else None
            values["verified_high"] = row.interval.high if row.interval else None
            counts = asdict(row.counts) if row.counts else dict.fromkeys(VERDICTS)
            values |= counts
            values |= {
                "versus_dense": row.versus_dense_difference,
                "versus_dense_wins": row.versus_dense.wins if row.versus_dense else None,
                "versus_dense_losses": row.versus_dense.losses if row.versus_dense else None,
                "versus_dense_p_holm": row.versus_dense_p,
                "seconds_per_image": row.seconds,
                "peak_mb": row.peak_mb,
                "epochs": row.budget,
                "parameters_left": row.parameters_left,
                "flops_nonzero": row.flops_nonzero,
                "flops_executed": row.flops_executed,
                **{f"paper_{name}": value for name, value in row.printed.items()},
                "errors": " | ".join(row.errors),
            }
            flat.append(values)
    return flat
