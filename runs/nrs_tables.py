"""The tables of the NRSLoss suite, from records alone: the paper's I, II, IV, V and VI beside what is printed.

Beside them: every state with all that is measured of it, what removing channels saves, and rewinding in numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runs import paper
from runs.cell import magnitude_text
from runs.grids import CONSTANT, Grid, csv_text
from runs.nrs_lines import Line, Study, proved_by, share_of, verified
from runs.statistics import clopper_pearson

ROWS: Mapping[str, str] = {
    "dense": "Dense",
    "imp": "IMP",
    "snip": "SNIP",
    "taylor": "TP",
    "hydra": "HYDRA",
    "hydra+nrs": "HYDRA+NRSLoss",
    "imp+rs": "IMP+RSLoss",
    "imp+nrs": "IMP+NRSLoss",
    "structlth": "StructLTH",
    "slimming": "Slim",
    "lwm": "LWM",
    "hydra-once": "HYDRA",
}
"""Rows that the paper prints, and how it calls them."""

TRAININGS: Mapping[str, str] = {"fgsm": "FGSM", "crown-ibp": "auto-LiRPA", "fast-ibp": "FastIBP"}
_ONE_SHOT = "CROWN-IBP (HYDRA code)"
_DATA: Mapping[str, str] = {
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar10_subset": "CIFAR10",
}
PAPER_IMAGES = 200
ONE_SHOT = ("lwm", "hydra-once")
BOUNDS = ("ibp", "crown-ibp", "crown")


def printed(table: str, line: Line, label: str | None = None, verifier: str | None = None,
            kept: float | None = None) -> dict[str, str] | None:  # fmt: skip
    """The paper's row of a table for a line's data, training and radius, as its file has it; None where it has none.

    ``label`` is another row than the line's own ("dense"), ``verifier`` a column of Table V, ``kept`` a ratio of VI.
    """
    name = ROWS.get((label or line.label).removesuffix(" as released"))
    training = _ONE_SHOT if table == "VI" else TRAININGS.get(line.kind)
    eps = None if table == "VI" else line.perturbation.magnitude
    for row in paper.rows("certified_pruning.csv"):
        if (row["table"], row["method"], row["training"]) != (table, name, training):
            continue
        if row["dataset"] != _DATA.get(line.cell.data.name) or line.perturbation.kind != "linf":
            continue
        if eps is not None and abs(_number(row["eps"]) - eps) > 1e-9:
            continue
        if verifier is not None and row["verifier"] != verifier:
            continue
        if kept is not None and abs(float(row["remain_ratio"]) - kept) > 1e-6:
            continue
        return row
    return None


def _number(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def differences(study: Study) -> tuple[str, ...]:
    """Why the printed numbers are another experiment than these; nothing where they are the same."""
    cell = study.cell
    reasons = []
    if cell.network.name not in ("cnn7_nrs", "cnn_large") or cell.network.width != 1.0:
        reasons.append(f"network {cell.network.label}")
    if cell.data.limit is not None or cell.data.name not in ("fashion_mnist", "svhn", "cifar10"):
        reasons.append(f"data {cell.data.label}")
    wanted = {300 if magnitude_text(line.perturbation.magnitude) == "8/255" else 200 for line in study.lines}
    if (epochs := {line.cell.training.epochs for line in study.lines}) != wanted:
        reasons.append(f"{'/'.join(map(str, sorted(epochs)))} epochs a state, not {'/'.join(map(str, sorted(wanted)))}")
    if study.images != PAPER_IMAGES:
        reasons.append(f"{study.images} images certified, not {PAPER_IMAGES}")
    if (cell.verifier.seconds or 0) < 300:
        reasons.append(f"{cell.verifier.seconds or 60:g} s an image, not 300")
    return tuple(reasons)


def _paper_note(study: Study) -> str:
    reasons = differences(study)
    if not reasons:
        return "The paper's numbers stand beside ours; it selects on test images."
    return "The paper's numbers stand beside ours and are not comparable: " + "; ".join(reasons) + "."


def percent(value: float) -> str:
    """A share in [0, 1] as a percentage with one digit."""
    return f"{100 * value:.1f}"


def share(value: float, images: int) -> str:
    """``29.5/50 59 % [44, 73]``; the count is a mean over seeds."""
    interval = clopper_pearson(min(value, 1.0) * images, images)
    return f"{value * images:.4g}/{images} {100 * value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.{digits}f}"


def _paper_text(row: Mapping[str, str] | None) -> str:
    """What the paper prints in a row: remains · std · adv · verified with the interval of 200 images · seconds."""
    if row is None:
        return "–"
    value = float(row["ver"]) / 100
    interval = clopper_pearson(value * PAPER_IMAGES, PAPER_IMAGES)
    parts = [
        f"{name} {row[key]}" for name, key in (("remains", "remain_ratio"), ("std", "std"), ("adv", "adv")) if row[key]
    ]  # fmt: skip
    ours = f"verified {row['ver']} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    return " · ".join([*parts, ours, f"{row['t']} s"] if row["t"] else [*parts, ours])


def _flag(line: Line, step: int, text: str) -> str:
    found = line.constant(step)
    return f"{text} ({CONSTANT} {found}/{len(line.records)})" if found else text


def _remains(line: Line, step: int, what: str = "conv") -> str:
    """Share of the convolutions' weights that is left, or of the channels for structured lines."""
    key = "channels" if what == "conv" and line.structured else what
    return f"{statistics.fmean(state['remaining'][key] for state in line.states(step)):.3f}"


def _seconds(line: Line, step: int) -> str:
    return f"{line.mean(step, lambda r: r['timing']['seconds_mean']):.2f}"


def grids(study: Study, *, states: bool = True) -> list[Grid]:
    """Every table of a study that has rows; without ``states``, those of single lines are left out."""
    made = [
        _first(study), _radii(study), _trainings(study), _criteria(study), _one_shot(study), _rewinding(study),
        *(_states(study, line) for line in study.lines if states), _removal(study), _cost(study),
    ]  # fmt: skip
    return [grid for grid in made if grid.rows]


def _plain_lines(study: Study) -> list[Line]:
    """Lines that are rows of Table I, and the rewindings beside them."""
    return [line for line in study.lines if line.label not in ONE_SHOT]


def _first(study: Study) -> Grid:
    """Table I: every row at the step chosen on validation, against the dense state of the same training."""
    rows: list[tuple[str, ...]] = []
    lines = _plain_lines(study)
    for key in dict.fromkeys((line.cell.training, line.perturbation) for line in lines):
        group = [line for line in lines if (line.cell.training, line.perturbation) == key]
        if (dense := study.dense(group[0])) is not None:
            rows.append(_first_row(study, dense, 0, "dense", printed("I", dense, "dense")))
        for line in group:
            if line.steps > 1:
                rows.append(_first_row(study, line, line.chosen, line.label, printed("I", line)))
    return Grid(
        f"Table I: rows at the state chosen on validation · {study.title}",
        (
            "row", "training", "seeds", "step", "remains", "of all parameters", "std %", "FGSM %", "PGD %", "verified",
            "s/image", "Δ std", "Δ verified", "against dense", "best on test (optimistic)", "paper",
        ),
        tuple(rows),
        (
            "remains: of the convolutions' weights, of the channels for slimming and structlth. verified: right and "
            f"proved by the complete verifier, {study.images} images, exact 95 % intervals; std, FGSM and PGD on "
            f"{study.test_images} images.",
            "against dense: ticket: neither std nor verified is below the dense network's; better: verified is higher "
            "(p < 0.05); worse: one of them is lower (p < 0.05); open: lower, but these images cannot tell. Exact sign "
            "tests over images, adjusted by Holm over all states; the interval is that of the difference in verified.",
            _paper_note(study),
        ),
    )  # fmt: skip


def _first_row(study: Study, line: Line, step: int, name: str, row: Mapping[str, str] | None) -> tuple[str, ...]:
    ticket = study.ticket(line, step) if step else None
    best = line.optimistic
    return (
        _flag(line, step, name),
        line.training,
        str(len(line.records)),
        str(step),
        _remains(line, step),
        _remains(line, step, "total"),
        _spread([100 * share_of(r["std"]) for r in line.results(step)]),
        percent(line.mean(step, lambda r: share_of(r["fgsm"]))),
        percent(line.mean(step, lambda r: share_of(r["pgd"]))),
        share(line.mean(step, verified), study.images),
        _seconds(line, step),
        *_against(ticket),
        f"step {best}: {percent(line.mean(best, verified))}" if step else "–",
        _paper_text(row),
    )


def _against(ticket: Any) -> tuple[str, str, str]:
    if ticket is None:
        return "–", "–", "–"
    low, high = 100 * ticket.interval.low, 100 * ticket.interval.high
    return (
        f"{100 * ticket.std:+.1f} (p {ticket.std_p:.2g})",
        f"{100 * ticket.verified:+.1f} [{low:+.0f}, {high:+.0f}] (p {ticket.verified_p:.2g})",
        ticket.mark,
    )


def _short(study: Study, line: Line, step: int, row: Mapping[str, str] | None) -> str:
    text = (
        f"remains {_remains(line, step)} · std {percent(line.mean(step, lambda r: share_of(r['std'])))} · "
        f"{share(line.mean(step, verified), study.images)} · {_seconds(line, step)} s"
    )
    return _flag(line, step, text) + (f" | paper: {_paper_text(row)}" if row is not None else "")


def _side_by_side(study: Study, table: str, what: str, columns: Mapping[str, Sequence[Line]]) -> Grid:
    """Rows of lines with the same label, a column for each group of them."""
    names = [name for name in columns if columns[name]]
    labels = list(dict.fromkeys(line.label for name in names for line in columns[name]))
    rows = []
    if len(names) > 1:
        bases = {name: study.dense(columns[name][0]) for name in names}
        dense = [
            "–" if (base := bases[name]) is None else _short(study, base, 0, printed(table, base, "dense"))
            for name in names
        ]  # fmt: skip
        rows.append(("dense", *dense))
        for label in labels:
            found = {name: next((x for x in columns[name] if x.label == label), None) for name in names}
            rows.append(
                (
                    label,
                    *(
                        "–" if (x := found[name]) is None else _short(study, x, x.chosen, printed(table, x))
                        for name in names
                    ),
                )
            )
    return Grid(f"Table {table}: {what} · {study.title}", ("row", *names), tuple(rows), (_paper_note(study),))


def _radii(study: Study) -> Grid:
    lines = [line for line in _plain_lines(study) if line.kind == "crown-ibp" and line.steps > 1]
    radii = dict.fromkeys(line.perturbation.magnitude for line in lines)
    columns = {
        f"ε = {magnitude_text(eps)}": [x for x in lines if x.perturbation.magnitude == eps == x.cell.training.eps]
        for eps in radii
    }
    return _side_by_side(study, "II", "verified at several radii under CROWN-IBP", columns)


def _trainings(study: Study) -> Grid:
    lines = [line for line in _plain_lines(study) if line.steps > 1]
    columns = {kind: [line for line in lines if line.kind == kind] for kind in ("crown-ibp", "fast-ibp")}
    shared = set.intersection(*({(line.perturbation) for line in found} for found in columns.values()))
    columns = {kind: [line for line in found if line.perturbation in shared] for kind, found in columns.items()}
    return _side_by_side(study, "IV", "CROWN-IBP beside Fast-IBP", columns if shared else {})


def _criteria(study: Study) -> Grid:
    """Table V: bounds without branching beside complete verification, and two ways to average over seeds."""
    rows = []
    for line in study.lines:
        if line.kind not in ("crown-ibp", "fast-ibp", "ibp") or line.steps < 2 or line.label in ONE_SHOT:
            continue
        step, best = line.chosen, line.optimistic
        theirs = {name: printed("V", line, verifier=name) for name in
                  ("IBP", "CROWN", "beta-CROWN (AVG)", "beta-CROWN (BEST)")}  # fmt: skip
        values = [row["ver"] if row is not None else "–" for row in theirs.values()]
        rows.append(
            (
                _flag(line, step, line.label), line.training, str(len(line.records)), str(step),
                *(share(line.mean(step, proved_by(name)), study.images)
                  for name in BOUNDS),
                percent(line.mean(step, lambda r: r["ibp_test"] / len(r["std"]))),
                share(line.mean(step, verified), study.images),
                f"{percent(line.mean(best, verified))} (step {best})",
                percent(line.best_by_seed()),
                " / ".join(values) if any(value != "–" for value in values) else "–",
            )
        )  # fmt: skip
    return Grid(
        f"Table V: incomplete and complete verification · {study.title}",
        (
            "row", "training", "seeds", "step", "IBP", "CROWN-IBP", "CROWN", f"IBP, {study.test_images} images",
            "complete", "AVG", "BEST", "paper: IBP / CROWN / AVG / BEST",
        ),
        tuple(rows),
        (
            "Complete verification can only add to what a bound proves on the same images. AVG: mean over seeds, then "
            "the best step; BEST: the best step of each seed, then the mean; both choose on test images, as the paper "
            "does. With one seed they are the same.",
            _paper_note(study),
        ),
    )  # fmt: skip


def _one_shot(study: Study) -> Grid:
    """Table VI: pruned once; verified by CROWN-IBP, as in the paper."""
    rows: list[tuple[str, ...]] = []
    for line in sorted((line for line in study.lines if line.label in ONE_SHOT), key=lambda x: x.cell.pruning.ratio):
        kept = 1.0 - line.cell.pruning.ratio
        for step, ratio in ((0, 1.0), (1, kept)):
            name = "dense" if step == 0 else line.label
            row = printed("VI", line, name, kept=ratio)
            if step == 0 and rows and any(found[:2] == (name, line.training) for found in rows):
                continue  # every ratio starts from the same dense state
            value = line.mean(step, proved_by("crown-ibp"))
            rows.append(
                (
                    _flag(line, step, name), line.training, f"{ratio:g}", str(len(line.records)),
                    percent(line.mean(step, lambda r: share_of(r["std"]))), share(value, study.images),
                    share(line.mean(step, verified), study.images), row["ver"] if row is not None else "–",
                )
            )  # fmt: skip
    return Grid(
        f"Table VI: pruned once, then fine-tuned · {study.title}",
        ("row", "training", "remains", "seeds", "std %", "CROWN-IBP", "complete", "paper: CROWN-IBP %"),
        tuple(rows),
        ("remains: of all weights, layer by layer.", _paper_note(study)),
    )


def _rewinding(study: Study) -> Grid:
    """Figure 9 in numbers, with the two faults of the released code."""
    what = {
        "imp": "rewound to the initial weights",
        "imp-late": "rewound to the weights after the first epoch",
        "imp-finetune": "a correct fine-tune at the decayed rate",
        "imp-finetune-frozen": "as released: no convolution is trained",
        "imp-aliased": "as released under certified training: nothing is rewound",
    }
    lines = [line for line in study.lines if line.label in what and line.steps > 1]
    several = {x.training for x in lines for y in lines if x.training == y.training and x.label != y.label}
    lines = [line for line in lines if line.training in several]
    steps = max((line.steps for line in lines), default=0)
    rows = []
    for line in lines:
        shares = [_flag(line, step, percent(line.mean(step, verified))) for step in range(line.steps)]
        std = [percent(line.mean(step, lambda r: share_of(r["std"]))) for step in range(line.steps)]
        rows.append((line.label, what[line.label], line.training, *(f"{v} ({s})" for v, s in zip(shares, std))))
    return Grid(
        f"Figure 9 in numbers: rewinding and fine-tuning · {study.title}",
        ("row", "what follows a pruning", "training", *(f"step {step}" for step in range(steps))),
        tuple(row + ("–",) * (steps + 3 - len(row)) for row in rows),
        (f"verified % of {study.images} images (std % in brackets), mean over seeds.",),
    )


def _states(study: Study, line: Line) -> Grid:
    """Everything measured of every state of a line."""
    rows = []
    for step in range(line.steps):
        results = line.results(step)
        ticket = study.ticket(line, step)
        rest = "/".join(str(sum(r[name] for r in results)) for name in ("violated", "unknown", "timeout"))
        peaks = [r["timing"]["peak_mb"] for r in results if r["timing"]["peak_mb"] is not None]
        stable = [r["stability"] for r in results]
        pre_bn = [s["pre_bn"] for s in stable if s["pre_bn"] is not None]
        rows.append(
            (
                _flag(line, step, f"{step} ◄" if step == line.chosen and step else str(step)),
                _remains(line, step), _remains(line, step, "total"),
                *(_spread([100 * share_of(r[key]) for r in results]) for key in ("std", "fgsm", "pgd")),
                *(percent(line.mean(step, proved_by(name))) for name in BOUNDS),
                f"{share(line.mean(step, verified), study.images)} ({rest})",
                "–" if ticket is None else f"{100 * ticket.verified:+.1f} {ticket.mark}",
                _seconds(line, step), f"{max(peaks):.0f}" if peaks else "–",
                _spread([100 * s["unstable_ratio"] for s in stable]),
                " / ".join(f"{statistics.fmean(s['pre_activation'][k] for s in stable):.3g}" for k in INSTABILITY),
                " / ".join(f"{statistics.fmean(s[k] for s in pre_bn):.3g}" for k in INSTABILITY) if pre_bn else "–",
                percent(statistics.fmean(r["validation"]["verified"] / r["validation"]["images"] for r in results)),
            )
        )  # fmt: skip
    return Grid(
        f"Every state: {line.name} · {line.perturbation.label} · {study.title}",
        (
            "step", "remains", "of all parameters", "std %", "FGSM %", "PGD %", "IBP %", "CROWN-IBP %", "CROWN %",
            "complete (violated/unknown/timeout)", "against dense", "s/image", "peak MB", "unstable ReLUs %",
            "instability", "instability before BN", "validation %",
        ),
        tuple(rows),
        (
            "◄: chosen on validation images (share that some bound proves). instability: -l·u summed over the neurons "
            "of an image, as printed / mean / mean over unstable neurons, from interval bounds.",
        ),
    )  # fmt: skip


INSTABILITY = ("total", "mean", "unstable")


def _removal(study: Study) -> Grid:
    """What removing channels saves, and that the function stays the same."""
    rows = []
    for line in study.lines:
        if not line.structured:
            sizes = [s["size"] for s in line.states(line.steps - 1)]
            executed = statistics.fmean(s["flops_executed"] / s["flops"] for s in sizes)
            nominal = statistics.fmean(s["flops_nonzero"] / s["flops"] for s in sizes)
            rows.append(
                (line.label, line.training, str(line.steps - 1), "nothing", percent(executed), percent(nominal),
                 "nothing is exploited", "–", "–", "–")
            )  # fmt: skip
            continue
        for step in range(1, line.steps):
            states, results = line.states(step), line.results(step)
            facts = [s["removal"] for s in states]
            sizes = [s["size"] for s in states]
            crown = [r["bounds"]["crown"]["timing"] for r in results]
            masked = [r["masked"] for r in results if "masked" in r]
            memory = [t["peak_mb"] for t in crown if t["peak_mb"] is not None]
            same = " / ".join(f"{max(f[key] for f in facts):.1g}" for key in ("outputs", "ibp", "crown"))
            left = f", {sum(len(f['stayed']) for f in facts)} layers hold on" if any(f["stayed"] for f in facts) else ""
            rows.append(
                (
                    line.label, line.training, str(step),
                    f"{statistics.fmean(f['channels'] for f in facts):.4g} channels{left}",
                    percent(statistics.fmean(s["flops_executed"] / s["flops"] for s in sizes)),
                    percent(statistics.fmean(s["flops_nonzero"] / s["flops"] for s in sizes)), same,
                    f"{statistics.fmean(t['seconds_mean'] for t in crown):.3f}",
                    f"{statistics.fmean(t['seconds_mean'] for t in masked):.3f}" if masked else "–",
                    f"{max(memory):.0f}" if memory else "–",
                )
            )  # fmt: skip
    return Grid(
        f"Removed before verification · {study.title}",
        (
            "row", "training", "step", "removed", "FLOPs executed %", "FLOPs non-zero %",
            "largest difference: outputs / IBP / CROWN", "CROWN s/image", "with zeros instead", "peak MB",
        ),
        tuple(rows),
        (
            "Structured rows lose their pruned channels before anything is certified; differences are relative, and a "
            "larger one than rounding would stop the run. Single weights that are pruned stay as zeros: no verifier "
            "here is faster for them, and what they gain is what zeros do to the bounds.",
        ),
    )  # fmt: skip


def _cost(study: Study) -> Grid:
    rows = []
    for line in study.lines:
        timing = [record["training"]["timing"] for record in line.records]
        epochs = statistics.fmean(record["training"]["epochs"] for record in line.records)
        images = statistics.fmean(record["data"]["images"]["train"] for record in line.records)
        seconds = statistics.fmean(t["seconds"] for t in timing)
        certified = [sum(line.results(k)[i]["timing"]["seconds_mean"] for k in range(line.steps)) * study.images
                     for i in range(len(line.records))]  # fmt: skip
        peaks = [t["peak_mb"] for t in timing if t["peak_mb"] is not None]
        rows.append(
            (
                line.label, line.training, f"{epochs:g}", f"{seconds:.0f}",
                f"{epochs * images / seconds:.0f}" if seconds else "–", f"{max(peaks):.0f}" if peaks else "–",
                f"{statistics.fmean(certified):.0f}",
            )
        )  # fmt: skip
    return Grid(
        f"What it took · {study.title}",
        ("row", "training", "epochs", "training s", "images/s", "peak MB", "complete verification s"),
        tuple(rows),
        ("Wall time of a run, mean over seeds; images/s include validation.",),
    )


def flat(found: Sequence[Study]) -> Iterator[dict[str, Any]]:
    """One dictionary for each state and seed, with full-precision values."""
    for study in found:
        for line in study.lines:
            for step in range(line.steps):
                for seed, state, result in zip(line.seeds, line.states(step), line.results(step)):
                    yield _flat(study, line, step, seed, state, result)


def _flat(study: Study, line: Line, step: int, seed: int, state: Mapping[str, Any], result: Mapping[str, Any]
          ) -> dict[str, Any]:  # fmt: skip
    ticket = study.ticket(line, step)
    stability = result["stability"]
    values: dict[str, Any] = {
        "data": study.cell.data.name,
        "network": study.cell.network.label,
        "row": line.label,
        "training": line.kind,
        "eps": line.perturbation.magnitude,
        "epochs": state["epochs"],
        "seed": seed,
        "step": step,
        "chosen": step == line.chosen,
        "constant": result["constant"],
        **{f"remains_{name}": value for name, value in state["remaining"].items()},
        "flops_executed": state["size"]["flops_executed"] / state["size"]["flops"],
        "test_images": len(result["std"]),
        **{name: result[name].count("1") for name in ("std", "fgsm", "pgd")},
        "ibp_test": result["ibp_test"],
        "images": result["images"],
        **{f"{name}_verified": result["bounds"][name]["bits"].count("1") for name in BOUNDS},
        **{f"{name}_seconds": result["bounds"][name]["timing"]["seconds_mean"] for name in BOUNDS},
        "verified": result["verified"],
        **{name: result[name] for name in ("holds", "violated", "unknown", "timeout")},
        "seconds": result["timing"]["seconds_mean"],
        "peak_mb": result["timing"]["peak_mb"],
        "unstable_ratio": stability["unstable_ratio"],
        **{f"instability_{name}": stability["pre_activation"][name] for name in INSTABILITY},
        **{f"instability_pre_bn_{name}": (stability["pre_bn"] or {}).get(name) for name in INSTABILITY},
        "validation_images": result["validation"]["images"],
        "validation_verified": result["validation"]["verified"],
        "against_dense": ticket.mark if ticket else None,
        "verified_difference": ticket.verified if ticket else None,
        "verified_p_holm": ticket.verified_p if ticket else None,
        "std_difference": ticket.std if ticket else None,
        "std_p_holm": ticket.std_p if ticket else None,
    }
    return values


def as_csv(found: Sequence[Study]) -> str:
    """:func:`flat` as CSV."""
    return csv_text(list(flat(found)))
