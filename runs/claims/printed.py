"""What the papers' own tables say on their sentences: comparisons between printed rows, counted and tested."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from runs import paper
from runs.claims.claim import Finding
from runs.statistics import holm

Row = Mapping[str, str]
Choose = Callable[[Row], bool]

USN_IMAGES = 154
"""Test images behind every printed value of the USN paper."""


def rows(table: Iterable[str], name: str) -> list[Row]:
    """The printed rows of some tables of a paper (``usn``, ``certified_pruning`` or ``car``)."""
    wanted = set(table)
    return [row for row in paper.rows(f"{name}.csv") if row["table"] in wanted]


def where(**values: str) -> Choose:
    """Rows that have these values."""
    return lambda row: all(row[name] == value for name, value in values.items())


def counted(differences: Iterable[float], *, universal: bool = True, note: str = "") -> Finding:
    """Wins, losses and ties of printed differences (positive: as the paper says)."""
    values = list(differences)
    return Finding(
        sum(v > 0 for v in values), sum(v < 0 for v in values), sum(v == 0 for v in values), None, universal, note
    )


def compare(
    found: Iterable[Row], first: Choose, second: Choose, same: Iterable[str], column: str, *, universal: bool = True,
    note: str = "",
) -> Finding:  # fmt: skip
    """Every printed row of ``first`` against those of ``second`` that agree in the columns ``same``."""
    listed, keys = list(found), tuple(same)
    return counted(
        (
            round(float(one[column]) - float(other[column]), 6)
            for one in listed
            if first(one) and one[column]
            for other in listed
            if second(other) and other[column] and all(one[key] == other[key] for key in keys)
        ),
        universal=universal,
        note=note,
    )


def usn(tables: Iterable[str], first: Choose, second: Choose, same: Iterable[str], universal: bool = True) -> Finding:
    """The USN paper's shares as counts of 154 images: differences, and Fisher's exact test with Holm's adjustment."""
    from scipy.stats import fisher_exact

    listed, keys = rows(tables, "usn"), tuple(same)
    differences, p_values = [], []
    for one in filter(first, listed):
        for other in filter(second, listed):
            if all(one[key] == other[key] for key in keys):
                a, b = (round(float(row["value"]) * USN_IMAGES) for row in (one, other))
                differences.append(float(a - b))
                p_values.append(float(fisher_exact([[a, USN_IMAGES - a], [b, USN_IMAGES - b]]).pvalue))
    if not differences:
        raise ValueError(f"no two printed rows of tables {', '.join(tables)} agree in {', '.join(keys)}")
    made = counted(differences, universal=universal)
    return Finding(made.wins, made.losses, made.ties, sum(p < 0.05 for p in holm(p_values)), universal)


def usn_against_random() -> Finding:
    """Table I: USN against random at the same ratio, 15 comparisons."""
    return usn("I", where(rule="usn"), where(rule="random"), ("rho", "perturbation", "magnitude"))


def usn_against_unpruned() -> Finding:
    """Table II: USN against ratio 0, 15 comparisons."""
    return usn(("II",), where(rule="usn"), where(rule="none"), ("perturbation", "magnitude"))


def usn_regulariser(*ratios: str, helps: bool) -> Finding:
    """Table III: λ_W = 10 against 0 at some ratios."""
    first, second = ("10", "0") if helps else ("0", "10")
    return usn(
        ("III",),
        lambda row: row["lambda_w"] == first and row["rho"] in ratios,
        lambda row: row["lambda_w"] == second,
        ("rho", "perturbation", "magnitude"),
        False,
    )


def usn_largest_gain() -> Finding:
    """Table I: at each ratio, the gain at contrast 0.05 against the largest gain elsewhere."""
    listed = rows("I", "usn")
    gains: dict[str, dict[tuple[str, str], float]] = {}
    for one in filter(where(rule="usn"), listed):
        place = (one["perturbation"], one["magnitude"])
        other = next(
            row
            for row in listed
            if row["rule"] == "random" and row["rho"] == one["rho"] and (row["perturbation"], row["magnitude"]) == place
        )
        gains.setdefault(one["rho"], {})[place] = float(one["value"]) - float(other["value"])
    highest = ("contrast", "0.05")
    return counted(
        round(found[highest] - max(gain for place, gain in found.items() if place != highest), 6)
        for found in gains.values()
    )


def usn_best_ratio() -> Finding:
    """Table I: ratio 0.2 against 0.1 and 0.3, perturbation by perturbation."""
    return usn(
        ("I",),
        where(rule="usn", rho="0.2"),
        lambda row: row["rule"] == "usn" and row["rho"] != "0.2",
        ("perturbation", "magnitude"),
    )


def nrs(
    first: Choose, second: Choose, column: str = "ver", tables: Iterable[str] = ("I",), universal: bool = True
) -> Finding:
    """The NRSLoss paper: rows against rows of the same data set, radius and training."""
    return compare(
        rows(tables, "certified_pruning"), first, second, ("dataset", "eps", "training"), column, universal=universal
    )


def method(*names: str, training: str = "") -> Choose:
    """Rows of some methods, under one training where it is named."""
    return lambda row: row["method"] in names and (not training or row["training"] == training)


def others(*names: str, training: str = "") -> Choose:
    """Rows of all pruning methods except some."""
    return lambda row: row["method"] not in (*names, "Dense") and (not training or row["training"] == training)


def pruned(training: str = "") -> Choose:
    """Rows of every pruning method."""
    return others(training=training)


def complete_is_tighter() -> Finding:
    """Table V: beta-CROWN (average) against IBP and CROWN on the same method."""
    return compare(
        rows("V", "certified_pruning"),
        where(verifier="beta-CROWN (AVG)"),
        lambda row: row["verifier"] in ("IBP", "CROWN"),
        ("method",),
        "ver",
        note="other image sets: the incomplete ones use all 10,000",
    )


def tickets(eps: str = "", skip: tuple[str, ...] = ()) -> Finding:
    """Table II: methods whose best sparse state reaches the dense net in accuracy and in verified share."""
    listed = [row for row in rows(("II",) if eps else ("I",), "certified_pruning") if not eps or row["eps"] == eps]
    dense = {(row["dataset"], row["eps"]): row for row in listed if row["method"] == "Dense" and row["ver"]
             and row["training"] == "auto-LiRPA"}  # fmt: skip
    found = []
    for row in listed:
        if row["method"] in ("Dense", *skip) or row["training"] != "auto-LiRPA":
            continue
        other = dense[row["dataset"], row["eps"]]
        found.append(1.0 if all(float(row[c]) >= float(other[c]) for c in ("std", "ver")) else -1.0)
    return counted(found, universal=False)


def largest_gain(dataset: str, training: str, printed: float) -> Finding:
    """Table I: whether the largest gain over dense of a data set is the one that the abstract prints."""
    listed = [
        row for row in rows("I", "certified_pruning") if row["dataset"] == dataset and row["training"] == training
    ]
    dense = next(float(row["ver"]) for row in listed if row["method"] == "Dense")
    gain = max(float(row["ver"]) - dense for row in listed)
    return counted([1.0 if abs(gain - printed) < 0.05 else -1.0], note=f"largest gain in the table: {gain:.1f} points")


def table_six() -> Finding:
    """Table VI: least weight magnitude against HYDRA at the same remaining share."""
    return compare(
        rows(("VI",), "certified_pruning"), where(method="LWM"), where(method="HYDRA"), ("remain_ratio",), "ver"
    )


def car(
    first: Choose,
    second: Choose,
    same: Iterable[str],
    column: str = "pca",
    table: str = "1",
    universal: bool = True,
) -> Finding:
    """The CAR paper: rows against rows of the same data set and network."""
    return compare(rows((table,), "car"), first, second, ("dataset", "model", *same), column, universal=universal)


def car_ablation(table: str, best: str, *rest: str, universal: bool = True) -> Finding:
    """Tables 3 to 5: one variant against others of the same study."""
    return car(where(variant=best), lambda row: row["variant"] in rest, (), "pca", table, universal)


def bound(function: Callable[..., Finding], *args: object, **kwargs: object) -> Callable[[], Finding]:
    """A finding with its arguments, computed when it is asked for."""
    return partial(function, *args, **kwargs)
