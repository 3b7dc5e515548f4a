"""The tables of the CAR suite, from records alone: the paper's 1 to 5 beside what is printed, and what they rest on.

The paper's certified share (PCA by CC-Cert, which is no certificate) and the valid one have columns of their own, each
with a 95 % Clopper-Pearson interval over the test images. Shares are means over seeds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from runs import paper as papers
from runs.car_lines import Bits, Line, Study, accurate, paired, paper, valid
from runs.grids import CONSTANT, Grid
from runs.statistics import holm
from runs.suites import car

LONGER = "lmp longer"
NOT_VALID = "PCA, paper (CC-Cert: NOT VALID)"
VALID = "PCA, valid"
PRINTED_NAMES = {
    "vanilla": "Vanilla", "advtrain": "AdvTrain", "lmp": "LMP", "advtrain+lmp": "AdvTrain+LMP", "hydra": "HYDRA",
    "car": "CAR",
}  # fmt: skip
_PRINTED_NETWORKS = {"resnet18": "resnet18", "mobilenetv2": "mobilenet_v2", "googlenet": "googlenet"}
_STUDIES = (
    ("3", "Table 3: CAR without each of its losses", "full", (*car.ABLATIONS, "ce")),
    ("4", "Table 4: initialisation of the masks", "tau=30", car.INITIALISATIONS),
    ("5", "Table 5: noise delta on the masks and safety factor eta", "delta=0.5", car.NOISES),
)
RIVALS = ("lmp", LONGER, "hydra")
"""What CAR is held against at its own sparsity."""

UNLIKE = (
    "Printed: accuracy / PCA in per cent, of the paper's data (Flowers-102, CelebA-HQ), ImageNet-pretrained networks, "
    "generator and eps = 1e-3 by CC-Cert. Little of that is the same here: compare the order of rows at most."
)

LENGTH = (
    "CAR's masks are trained for epochs that LMP and HYDRA do not have. lmp longer is fine-tuned for as many epochs as "
    "CAR's masks and fine-tuning take together (an epoch of masks is three passes)."
)


def grids(study: Study) -> list[Grid]:
    """Every table of a study that has rows."""
    made = [
        _rows(study), _matched(study), _networks(study), *(_variants(study, *what) for what in _STUDIES),
        _tests(study), _finetuning(study), _certificates(study),
    ]  # fmt: skip
    return [grid for grid in made if grid.rows]


def _share(line: Line, bits: Bits) -> str:
    interval = line.interval(bits)
    return f"{100 * line.share(bits):.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _measured(line: Line) -> tuple[str, ...]:
    """Accuracy, the paper's PCA, the valid one, and how many of these very images are robust at least."""
    count = sum(entry.result["truly"] for entry in line.entries) / len(line.entries)
    return (
        _share(line, accurate),
        _share(line, paper) if line.has_paper else "–",
        _share(line, valid),
        f"{100 * count / line.entries[0].result['images']:.1f}",
    )


def _heads(study: Study) -> tuple[str, ...]:
    line = study.lines[0]
    accuracy = len(accurate(line.entries[0]))
    first = line.entries[0].result
    drawn = first["paper"]["certificate"]["n_max"] if line.has_paper else 0
    return (
        f"accuracy, % of {accuracy}",
        f"{NOT_VALID}, % of {study.images}, {drawn:,} draws",
        f"{VALID}, % of {study.images}, up to {first['certificate']['n_max']:,} draws",
        "robust at least, %",
    )


def _named(line: Line) -> str:
    if not line.collapsed:
        return line.row
    return f"{line.row} {CONSTANT} in {line.collapsed} of {len(line.entries)} seeds"


def _rows(study: Study) -> Grid:
    rows = []
    for line in study.lines:
        if line.row not in (*car.ROWS, LONGER):
            continue
        q = 0 if line.edits == 0 else 1000 if line.edits < 2000 else 4000
        printed = (_printed("1", data, "resnet18", line, q) for data in ("flowers102", "celeba-hq"))
        rows.append(
            (_named(line), line.network, f"{100 * line.ratio:.0f}", f"{line.edits:,}", str(len(line.entries)),
             *_measured(line), *printed)
        )  # fmt: skip
    head = (
        "method", "network", "pruned, %", "edits", "seeds", *_heads(study), "printed, Flowers", "printed, CelebA",
    )  # fmt: skip
    notes = (
        UNLIKE,
        "Printed at the nearest of the paper's 0, 1,000 and 4,000 edits, on ResNet-18.",
        *([LENGTH] if any(row[0] == LONGER for row in rows) else []),
        *_meaning(study),
    )
    return Grid(f"Table 1: methods · {study.title}", head, tuple(rows), notes)


def _meaning(study: Study) -> tuple[str, ...]:
    line = study.lines[0].entries[0].result
    own, other = line["certificate"], line.get("paper", {}).get("certificate")
    joint = f"jointly over {own['joint']} images" if own["joint"] else "for each image on its own"
    said = [
        f"Valid: the label changes with probability at most {own['eps']:g} over the edit's draws, with "
        f"{100 * own['confidence']:g} % confidence {joint} ({own['bound']}), and the image itself is right.",
        "Robust at least: what holds of these very images with the same confidence, certificates that may be false "
        "taken off.",
    ]
    if other is not None:
        said.append(
            f"CC-Cert is {other['why']}: {100 * other['confidence']:.1f} % here. It compares probabilities with half "
            "the margin, not labels, so it may refuse what is robust."
        )
    return tuple(said)


def _printed(table: str, data: str, network: str, line: Line, q: int) -> str:
    for row in papers.rows("car.csv"):
        same = (
            row["table"] == table and row["dataset"] == data and row["model"] == network
            and row["method"] == PRINTED_NAMES.get(line.row) and abs(float(row["prune_ratio"]) - line.ratio) < 5e-3
            and (not row["n_aug"] or int(row["n_aug"]) == q)
        )  # fmt: skip
        if same:
            return _numbers(row)
    return "–"


def _numbers(row: Mapping[str, str]) -> str:
    return f"{row['accuracy'] or '–'} / {row['pca'] or '–'}"


def _networks(study: Study) -> Grid:
    names = list(dict.fromkeys(line.network for line in study.lines))
    rows = []
    for line in study.lines:
        if len(names) < 2 or line.row not in ("vanilla", "lmp", "car") or line.ratio not in (0.0, 0.5):
            continue
        model = _PRINTED_NETWORKS.get(line.entries[0].cell.network.name)
        printed = "–" if model is None else _printed("2", "celeba-hq", model, line, 0)
        rows.append(
            (line.network, _named(line), f"{100 * line.ratio:.0f}", f"{line.edits:,}", *_measured(line), printed)
        )
    head = ("network", "method", "pruned, %", "edits", *_heads(study), "printed, CelebA")
    return Grid(f"Table 2: networks · {study.title}", head, tuple(rows), (UNLIKE,))


def _variants(study: Study, table: str, title: str, full: str, names: Sequence[str]) -> Grid:
    printed = {row["variant"]: _numbers(row) for row in papers.rows("car.csv") if row["table"] == table}
    found: list[tuple[Line, Line]] = []
    for line in study.lines:
        base = study.find("car", line.ratio, line.edits, line.network)
        if line.row.removeprefix("car ") in names and line.row != "car" and base is not None:
            found.append((line, base))
    compared = [paired(line, base, valid) for line, base in found]
    adjusted = iter(holm([test.p for pair in compared if pair is not None for test in (pair[1],)]))
    rows = [
        ("full", base.network, f"{100 * base.ratio:.0f}", *_measured(base), "", "", printed.get(full, "–"))
        for base in dict.fromkeys(base for _, base in found)
    ]
    for (line, _), pair in zip(found, compared):
        name = line.row.removeprefix("car ")
        change = ("–", "–") if pair is None else (f"{100 * pair[0]:+.1f}", f"{next(adjusted):.2g}")
        shown = _named(line).replace(line.row, name)
        rows.append((shown, line.network, f"{100 * line.ratio:.0f}", *_measured(line), *change, printed.get(name, "–")))
    head = ("variant", "network", "pruned, %", *_heads(study), "against full, points", "p (Holm)", "printed, CelebA")
    return Grid(f"{title} · {study.title}", head, tuple(rows), (UNLIKE,))


def _matched(study: Study) -> Grid:
    """CAR against LMP and HYDRA with as many weights left, by valid certificates of the same images."""
    tested = []
    for line in (line for line in study.lines if line.row == "car"):
        for name in RIVALS:
            other = study.find(name, line.ratio, line.edits, line.network)
            if other is not None and (pair := paired(line, other, valid)) is not None:
                tested.append((line, other, *pair))
    adjusted = holm([test.p for *_, test in tested])
    rows = tuple(
        (f"car – {other.row}", line.network, f"{line.edits:,}", f"{line.density:.2f} / {other.density:.2f}",
         f"{100 * line.share(valid):.1f} / {100 * other.share(valid):.1f}", f"{100 * gap:+.1f}", str(test.wins),
         str(test.losses), f"{test.p:.2g}", f"{p:.2g}", _verdict(gap, p))
        for (line, other, gap, test), p in zip(tested, adjusted)
    )  # fmt: skip
    head = (
        "rows", "network", "edits", "weights left, %", f"{VALID}, %", "points", "only the first", "only the second",
        "p", "p (Holm)", "at 5 %",
    )  # fmt: skip
    notes = (_MCNEMAR, *([LENGTH] if any(other.row == LONGER for _, other, *_ in tested) else []))
    return Grid(f"CAR against LMP and HYDRA at matched sparsity · {study.title}", head, rows, notes)


def _verdict(gap: float, p: float) -> str:
    if p > 0.05:
        return "not told apart"
    return "CAR ahead" if gap > 0 else "CAR behind"


_MCNEMAR = (
    "McNemar's exact test on the images that one row passes and the other does not; over several seeds the sign test "
    "on each image's number of seeds. Holm over the tests of a kind in this table."
)


def _tests(study: Study) -> Grid:
    """Paired tests between rows on the same images."""
    wanted = (
        ("car", "vanilla"), ("car", "lmp"), ("car", LONGER), ("car", "hydra"), ("car", "advtrain+lmp"),
        ("car", "advtrain"), ("lmp", "vanilla"), ("hydra", "lmp"), ("advtrain", "vanilla"),
    )  # fmt: skip
    tested = []
    for first, second in wanted:
        for line in (line for line in study.lines if line.row == first):
            ratio = 0.0 if second in ("vanilla", "advtrain") else line.ratio
            other = study.find(second, ratio, line.edits, line.network)
            if other is None:
                continue
            for what, bits in (("valid", valid), ("paper", paper), ("accuracy", accurate)):
                if what == "paper" and not (line.has_paper and other.has_paper):
                    continue
                if (pair := paired(line, other, bits)) is not None:
                    tested.append((line, other, what, *pair))
    by_kind = {
        what: iter(holm([test.p for *_, kind, _, test in tested if kind == what]))
        for what in ("valid", "paper", "accuracy")
    }
    rows = tuple(
        (f"{line.name} – {other.name}", line.network, f"{line.edits:,}", what, f"{100 * gap:+.1f}",
         str(test.wins), str(test.losses), f"{test.p:.2g}", f"{next(by_kind[what]):.2g}")
        for line, other, what, gap, test in tested
    )  # fmt: skip
    head = ("rows", "network", "edits", "in", "points", "only the first", "only the second", "p", "p (Holm)")
    return Grid(f"Paired tests on the same images · {study.title}", head, rows, (_MCNEMAR,))


def _finetuning(study: Study) -> Grid:
    rows = []
    for line in study.lines:
        made = [entry.record["training"] for entry in line.entries]
        if not all("before" in training for training in made):
            continue
        count = len(made)
        before, after = (100 * sum(t[name]["score"] for t in made) / count for name in ("before", "after"))
        density = 100 * sum(entry.record["mask"]["density"] for entry in line.entries) / count
        everything = 100 * sum(t["density_all"] for t in made) / count
        rows.append(
            (line.name, line.network, f"{line.edits:,}", f"{before:.1f}", f"{after:.1f}", f"{density:.2f}",
             f"{everything:.2f}")
        )  # fmt: skip
    head = (
        "method", "network", "edits", "validation accuracy before fine-tuning, %", "after, %",
        "left of convolutions and fully connected layers, %", "left of all parameters, %",
    )  # fmt: skip
    return Grid(f"CAR's masks before and after fine-tuning · {study.title}", head, tuple(rows))


def _certificates(study: Study) -> Grid:
    """What the certificates of a study state, each different value once."""
    results = [entry.result for line in study.lines for entry in line.entries]
    kinds = [("valid", [r["certificate"] for r in results])]
    if all("paper" in r for r in results):
        kinds.append(("paper", [r["paper"]["certificate"] for r in results]))
    names = (
        "bound", "valid", "why", "eps", "confidence", "joint", "n_max", "population", "law", "generator", "seed",
        "batch", "outputs", "fingerprint",
    )  # fmt: skip
    rows = []
    for name in names:
        values = [name]
        for _, certificates in kinds:
            seen = dict.fromkeys(_text(one[name]) for one in certificates if name in one)
            values.append("; ".join(seen) or "as left")
        rows.append(tuple(values))
    return Grid(f"What the certificates state · {study.title}", ("", *(kind for kind, _ in kinds)), tuple(rows))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(str(part)[:16] for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_csv(found: Sequence[Study]) -> str:
    """One row a line and seed, with full-precision values and the bits of every image."""
    out = io.StringIO()
    names = (
        "data", "perturbation", "method", "network", "ratio", "edits", "seed", "accuracy", "accuracy_images", "images",
        "clean", "valid_pca", "paper_pca", "truly", "eps", "confidence", "n_max", "draws", "valid_bits", "paper_bits",
    )  # fmt: skip
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for study in found:
        for line in study.lines:
            for entry in line.entries:
                result, accuracy = entry.result, entry.record["accuracy"]
                writer.writerow(
                    {
                        "data": study.data, "perturbation": study.perturbation.label, "method": line.row,
                        "network": line.network, "ratio": line.ratio, "edits": line.edits, "seed": entry.cell.seed,
                        "accuracy": accuracy["right"] / accuracy["images"], "accuracy_images": accuracy["images"],
                        "images": result["images"], "clean": result["clean"],
                        "valid_pca": result["verified"] / result["images"],
                        "paper_pca": result["paper"]["certified"] / result["images"] if line.has_paper else "",
                        "truly": result["truly"], "eps": result["certificate"]["eps"],
                        "confidence": result["certificate"]["confidence"], "n_max": result["certificate"]["n_max"],
                        "draws": result["draws"], "valid_bits": valid(entry),
                        "paper_bits": paper(entry) if line.has_paper else "",
                    }
                )  # fmt: skip
    return out.getvalue()
