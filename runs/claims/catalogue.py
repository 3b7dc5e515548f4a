"""The claims, one entry each, in the order of the papers."""

from __future__ import annotations

from dataclasses import replace

from runs.claims import printed
from runs.claims.claim import Claim
from runs.claims.observation import Observation, picked
from runs.claims.printed import bound, method, others, pruned, where
from runs.claims.questions import (
    AgainstEach,
    Exceeds,
    Falls,
    Gains,
    MatchesSomewhere,
    Measures,
    Verifies,
    VerifiesSomewhere,
)
from runs.claims.scope import Sampled, Under, edited
from runs.paper import CAR, NRS, USN

CERTIFIED = ("crown-ibp", "ibp", "fast-ibp")
ADVERSARIAL = ("fgsm", "pgd", "trades")
BASELINES = ("random", "magnitude", "imp", "snip", "taylor", "hydra", "slimming", "structlth")
NRS_METHODS = (*BASELINES, "imp+rs", "imp+nrs", "hydra+nrs")
STRUCTURED = ("slimming", "structlth")
PIXELWISE, LINF = ("brightness", "contrast"), ("linf",)

USN_QUICK = "python -m runs.compare usn --preset quick"
NRS_QUICK = "python -m runs.compare nrs --preset quick"
CAR_QUICK = "python -m runs.compare car --preset quick"


# --- numbers of an observation ---------------------------------------------------------------------------------------


def clean(one: Observation) -> float | None:
    """Accuracy on the certified images (classes), or mean error in pixels (keypoints)."""
    return float(one.result["clean"])


def unstable(one: Observation) -> float | None:
    """ReLUs whose sign interval bounds leave open, mean over the images; None where no bounds were taken."""
    found = one.result["unstable"]
    return None if found is None else float(found)


def seconds(one: Observation) -> float | None:
    """Median seconds of verification an image."""
    return float(one.result["timing"]["seconds_median"])


def peak(one: Observation) -> float | None:
    """Peak memory of verification, MB."""
    found = one.result["timing"]["peak_mb"]
    return None if found is None else float(found)


def work(one: Observation) -> float | None:
    """Sub-intervals that the exact verifier looked at, mean over the images."""
    found = one.result.get("sub_intervals_mean")
    return None if found is None else float(found)


def verified(one: Observation) -> float | None:
    """Share of the images that is verified."""
    return one.bits.count("1") / len(one.bits)


def random_channels(one: Observation) -> bool:
    """Channels removed at random: the paper's baseline, not single weights at random."""
    return one.method == "random-channels" or (
        one.method == "random" and one.record["cell"]["pruning"]["method"] == "usn"
    )


def correct_keypoints(one: Observation) -> float | None:
    """Visible keypoints within 2 px, mean over the images."""
    keypoints = one.result.get("keypoints")
    if keypoints is None:
        return None
    counts = keypoints["visible"]["correct"]["2"]
    return float(sum(counts) / len(counts))


def metric(one: Observation) -> float | None:
    """Mean importance (Eq. 19) of the kept channels of the measured layers."""
    layers = one.record.get("channels")
    if not layers:
        return None
    kept = [
        value
        for layer in layers.values()
        for value, bit in zip(layer["importance"], layer["kept"])
        if bit == "1"
    ]  # fmt: skip
    return sum(kept) / len(kept) if kept else None


def instability(one: Observation) -> float | None:
    """Network instability (Eq. 3) at the pre-activations, mean over test images, where the record has it."""
    found = one.result.get("stability")
    return None if found is None else float(found["pre_activation"]["mean"])


def incomplete(one: Observation) -> str | None:
    """The images that IBP, CROWN-IBP or CROWN verify, a bit each, where the record has them."""
    found = [bound["bits"] for bound in (one.result.get("bounds") or {}).values() if bound is not None]
    return "".join("1" if "1" in bits else "0" for bits in zip(*found, strict=True)) or None


def _best(name: str, *rivals: str) -> AgainstEach:
    """A method against each of its rivals, all under certified training."""
    one = picked(name, training=CERTIFIED)
    return AgainstEach(tuple(Verifies(one, picked(rival, training=CERTIFIED)) for rival in rivals), rivals)


def _highest_contrast(one: Observation) -> bool:
    return one.perturbation == "contrast 0.05"


# --- the papers ------------------------------------------------------------------------------------------------------

_USN = (
    Claim(
        "USN-1", USN, "§IV-A, Table I",
        "USN beats random pruning at matched ρ under every perturbation",
        Verifies(picked("usn"), random_channels), USN_QUICK, printed.usn_against_random,
    ),
    Claim(
        "USN-2", USN, "conclusion, Table II",
        "USN pruning certifies more than the unpruned network",
        Verifies(picked("usn"), picked("none"), same_ratio=False), USN_QUICK, printed.usn_against_unpruned,
    ),
    Claim(
        "USN-3", USN, "§IV-A",
        "the gain over random is largest at the highest contrast",
        Gains(picked("usn"), random_channels, _highest_contrast), USN_QUICK, printed.usn_largest_gain,
    ),
    Claim(
        "USN-4", USN, "§IV-A",
        "ρ = 0.2 is the best of the three ratios",
        AgainstEach(
            tuple(
                Verifies(picked("usn", ratios=(0.2,)), picked("usn", ratios=(ratio,)), same_ratio=False)
                for ratio in (0.1, 0.3)
            ),
            ("0.1", "0.3"),
        ),
        USN_QUICK, printed.usn_best_ratio,
    ),
    Claim(
        "USN-5", USN, "§IV-B, Table III",
        "λ_W = 10 certifies more than λ_W = 0 at ρ = 0.2 and 0.3",
        Verifies(picked("usn", ratios=(0.2, 0.3)), picked("usn-w0", ratios=(0.2, 0.3))),
        USN_QUICK, bound(printed.usn_regulariser, "0.2", "0.3", helps=True),
    ),
    Claim(
        "USN-6", USN, "§IV-B, Table III",
        "λ_W = 10 certifies less than λ_W = 0 at ρ = 0.1",
        Verifies(picked("usn-w0", ratios=(0.1,)), picked("usn", ratios=(0.1,))),
        "python -m runs.compare usn --preset lambda", bound(printed.usn_regulariser, "0.1", helps=False),
    ),
    Claim(
        "USN-7", USN, "Fig. 4 a, b",
        "USN gets more keypoints right than random pruning at matched ρ",
        Measures(picked("usn"), random_channels, correct_keypoints, more=True), USN_QUICK,
    ),
    Claim(
        "USN-8", USN, "Fig. 4 c, d",
        "pruned networks are verified with less work than the unpruned one",
        Measures(picked("usn"), picked("none"), work, more=False, same_ratio=False), USN_QUICK,
    ),
    Claim(
        "USN-9", USN, "Fig. 3",
        "USN pruning leaves channels with a lower metric than USN training without pruning",
        Measures(picked("usn"), picked("none"), metric, more=False, same_ratio=False), USN_QUICK,
    ),
    Claim(
        "USN-10", USN, "Fig. 3",
        "USN training without pruning has a higher metric than vanilla training",
        Measures(picked("none"), picked("vanilla"), metric, more=True, same_ratio=False), USN_QUICK,
    ),
)  # fmt: skip

_NRS = (
    Claim(
        "NRS-1", NRS, "§IV-C, Table I",
        "pruning raises verified accuracy over dense under adversarial (FGSM) training, for some sparsity",
        VerifiesSomewhere(picked(*NRS_METHODS, training=ADVERSARIAL), picked("dense", training=ADVERSARIAL)),
        "python -m runs.compare nrs --preset fgsm", bound(printed.nrs, pruned("FGSM"), method("Dense")),
    ),
    Claim(
        "NRS-2", NRS, "§IV-C, Table I",
        "pruning raises verified accuracy over dense under certified training, for some sparsity",
        VerifiesSomewhere(picked(*NRS_METHODS, training=CERTIFIED), picked("dense", training=CERTIFIED)),
        NRS_QUICK, bound(printed.nrs, pruned("auto-LiRPA"), method("Dense")),
    ),
    Claim(
        "NRS-3", NRS, "abstract",
        "the largest gain on CIFAR-10 under certified (the abstract: standard) training is 8.2 points",
        VerifiesSomewhere(
            picked("imp+nrs", training=CERTIFIED, data="cifar10"), picked("dense", training=CERTIFIED, data="cifar10")
        ),
        "python -m runs.compare nrs --preset paper --datasets cifar10",
        bound(printed.largest_gain, "CIFAR10", "auto-LiRPA", 8.2),
    ),
    Claim(
        "NRS-4", NRS, "abstract",
        "the largest gain on CIFAR-10 under adversarial training is 24.5 points",
        VerifiesSomewhere(
            picked(*NRS_METHODS, training=ADVERSARIAL, data="cifar10"),
            picked("dense", training=ADVERSARIAL, data="cifar10"),
        ),
        "python -m runs.compare nrs --preset paper --datasets cifar10",
        bound(printed.largest_gain, "CIFAR10", "FGSM", 24.5),
    ),
    Claim(
        "NRS-5", NRS, "§IV-C.2",
        "IMP+NRSLoss has the highest verified accuracy under certified training",
        _best("imp+nrs", *BASELINES, "imp+rs", "hydra+nrs"),
        NRS_QUICK,
        bound(printed.nrs, method("IMP+NRSLoss", training="auto-LiRPA"), others("IMP+NRSLoss", training="auto-LiRPA")),
    ),
    Claim(
        "NRS-6", NRS, "§IV-C.2",
        "NRSLoss beats plain IMP under certified training",
        Verifies(picked("imp+nrs", training=CERTIFIED), picked("imp", training=CERTIFIED)), NRS_QUICK,
        bound(printed.nrs, method("IMP+NRSLoss", training="auto-LiRPA"), method("IMP", training="auto-LiRPA")),
    ),
    Claim(
        "NRS-7", NRS, "§III-C",
        "NRSLoss beats RSLoss on networks with batch normalisation",
        Verifies(picked("imp+nrs"), picked("imp+rs")), NRS_QUICK,
        bound(printed.nrs, method("IMP+NRSLoss"), method("IMP+RSLoss")),
    ),
    Claim(
        "NRS-8", NRS, "§IV-C.1",
        "IMP has the best verified accuracy among existing methods under certified training",
        _best("imp", "snip", "taylor", "hydra", *STRUCTURED),
        NRS_QUICK,
        bound(
            printed.nrs, method("IMP", training="auto-LiRPA"),
            method("SNIP", "TP", "HYDRA", "StructLTH", "Slim", training="auto-LiRPA"),
        ),
    ),
    Claim(
        "NRS-19", NRS, "§IV-C.1, Table I",
        "IMP has the best accuracy among existing methods under certified training",
        AgainstEach(
            tuple(
                Measures(picked("imp", training=CERTIFIED), picked(rival, training=CERTIFIED), clean, more=True)
                for rival in ("snip", "taylor", "hydra", *STRUCTURED)
            ),
            ("snip", "taylor", "hydra", *STRUCTURED),
        ),
        NRS_QUICK,
        bound(
            printed.nrs, method("IMP", training="auto-LiRPA"),
            method("SNIP", "TP", "HYDRA", "StructLTH", "Slim", training="auto-LiRPA"), "std",
        ),
    ),
    Claim(
        "NRS-9", NRS, "§IV-C.5, Table VI",
        "magnitude pruning beats HYDRA",
        Verifies(picked("magnitude", "imp"), picked("hydra")), NRS_QUICK, printed.table_six,
    ),
    Claim(
        "NRS-10", NRS, "Fig. 4",
        "the share of unstable neurons falls with sparsity",
        Falls(picked(*NRS_METHODS), picked("dense"), unstable), NRS_QUICK,
    ),
    Claim(
        "NRS-11", NRS, "Fig. 8",
        "networks trained with RSLoss or NRSLoss are less unstable than IMP's",
        Measures(picked("imp+nrs", "imp+rs"), picked("imp"), instability, more=False), NRS_QUICK,
    ),
    Claim(
        "NRS-12", NRS, "§IV-C.4, Fig. 9",
        "rewinding beats fine-tuning",
        Verifies(picked("imp"), picked("imp-finetune")), "python -m runs.compare nrs --preset rewind",
    ),
    Claim(
        "NRS-13", NRS, "§IV-C.1",
        "unstructured pruning verifies more than structured pruning under certified training",
        Verifies(
            picked("imp", "imp+nrs", "snip", "taylor", training=CERTIFIED), picked(*STRUCTURED, training=CERTIFIED),
            same_ratio=False,
        ),
        NRS_QUICK,
        bound(
            printed.nrs, method("IMP", "SNIP", "TP", "IMP+NRSLoss", training="auto-LiRPA"),
            method("StructLTH", "Slim", training="auto-LiRPA"),
        ),
    ),
    Claim(
        "NRS-14", NRS, "Fig. 7",
        "structured pruning makes verification faster",
        Falls(picked(*STRUCTURED), picked("dense"), seconds), "python -m runs.compare nrs --preset structured",
    ),
    Claim(
        "NRS-15", NRS, "Fig. 7",
        "structured pruning makes verification need less memory",
        Falls(picked(*STRUCTURED), picked("dense"), peak), "python -m runs.compare nrs --preset structured",
    ),
    Claim(
        "NRS-16", NRS, "§IV-C.1, Table V",
        "complete verification verifies more than IBP and CROWN",
        Exceeds(picked("dense", *NRS_METHODS), incomplete),
        NRS_QUICK, printed.complete_is_tighter,
    ),
    Claim(
        "NRS-17", NRS, "§IV-C.3, Table II",
        "most methods find certified tickets at radius 8/255",
        Under(
            MatchesSomewhere(picked(*NRS_METHODS, training=CERTIFIED), picked("dense", training=CERTIFIED)),
            LINF, radii=(8 / 255,),
        ),
        "python -m runs.compare nrs --preset radii", bound(printed.tickets, "8/255"),
    ),
    Claim(
        "NRS-18", NRS, "§IV-C.3, Table I",
        "most methods find certified tickets at FashionMNIST 0.1 and at 2/255",
        Under(
            MatchesSomewhere(picked(*NRS_METHODS, training=CERTIFIED), picked("dense", training=CERTIFIED)),
            LINF, radii=(0.1, 2 / 255),
        ),
        NRS_QUICK, printed.tickets,
    ),
)  # fmt: skip

_CAR_TABLED = picked("car", ratios=(0.5, 0.7))
"""CAR at the ratios of the paper's Table 1."""

_CAR = (
    Claim(
        "CAR-1", CAR, "Table 1",
        "CAR always has the highest certified accuracy",
        Sampled(
            AgainstEach(
                (
                    Verifies(_CAR_TABLED, picked("dense", training=("natural",)), same_ratio=False),
                    Verifies(_CAR_TABLED, picked("dense", training=("pgd",)), same_ratio=False),
                    Verifies(_CAR_TABLED, picked("magnitude", training=("natural",))),
                    Verifies(_CAR_TABLED, picked("magnitude", training=("pgd",))),
                    Verifies(_CAR_TABLED, picked("hydra")),
                ),
                ("vanilla", "AdvTrain", "LMP", "AdvTrain+LMP", "HYDRA"),
            )
        ),
        CAR_QUICK,
        bound(printed.car, where(method="CAR"), lambda row: row["method"] != "CAR", ("n_aug",)),
    ),
    Claim(
        "CAR-2", CAR, "abstract",
        "CAR at 50 % beats the unpruned network",
        Sampled(Verifies(picked("car", ratios=(0.5,)), picked("dense", training=("natural",)), same_ratio=False)),
        CAR_QUICK,
        bound(printed.car, where(method="CAR", prune_ratio="0.5"), where(method="Vanilla"), ("n_aug",)),
    ),
    Claim(
        "CAR-3", CAR, "Table 1",
        "CAR beats magnitude pruning (LMP) at the same ratio",
        Sampled(Verifies(picked("car"), picked("magnitude", training=("natural",)))), CAR_QUICK,
        bound(printed.car, where(method="CAR"), where(method="LMP"), ("n_aug", "prune_ratio")),
    ),
    Claim(
        "CAR-4", CAR, "Table 1",
        "CAR beats HYDRA at the same ratio",
        Sampled(Verifies(picked("car"), picked("hydra"))), CAR_QUICK,
        bound(printed.car, where(method="CAR"), where(method="HYDRA"), ("n_aug", "prune_ratio")),
    ),
    Claim(
        "CAR-5", CAR, "§4.2",
        "HYDRA certifies less than magnitude pruning",
        Sampled(Verifies(picked("magnitude", training=("natural",)), picked("hydra"))), CAR_QUICK,
        bound(printed.car, where(method="LMP"), where(method="HYDRA"), ("n_aug", "prune_ratio")),
    ),
    Claim(
        "CAR-6", CAR, "§4.2",
        "adversarial training certifies less than plain training",
        Sampled(Verifies(picked("dense", training=("natural",)), picked("dense", training=("pgd",)), same_ratio=False)),
        CAR_QUICK,
        bound(printed.car, where(method="Vanilla"), where(method="AdvTrain"), ("n_aug",)),
    ),
    Claim(
        "CAR-7", CAR, "Table 2",
        "on every network CAR beats both the unpruned network and LMP",
        Sampled(
            AgainstEach(
                (
                    Verifies(picked("car", ratios=(0.5,)), picked("dense", training=("natural",)), same_ratio=False),
                    Verifies(picked("car", ratios=(0.5,)), picked("magnitude", training=("natural",))),
                ),
                ("vanilla", "LMP"),
            )
        ),
        "python -m runs.compare car --preset gpu",
        bound(printed.car, where(method="CAR"), lambda row: row["method"] != "CAR", (), table="2"),
    ),
    Claim(
        "CAR-8", CAR, "Table 2",
        "CAR's accuracy is that of the unpruned network",
        Sampled(Measures(picked("car"), picked("dense", training=("natural",)), clean, more=True, same_ratio=False)),
        CAR_QUICK,
        bound(
            printed.car, where(method="CAR"), where(method="Vanilla"), (), column="accuracy", table="2",
            universal=False,
        ),
    ),
    Claim(
        "CAR-9", CAR, "Table 3",
        "each loss adds certified accuracy",
        Sampled(Verifies(picked("car"), picked("car no_stab", "car no_ratio", "car no_consis", "car no_l1"))),
        "python -m runs.compare car --preset ablation",
        bound(printed.car_ablation, "3", "full", "no_stab", "no_ratio", "no_consis", "no_l1"),
    ),
    Claim(
        "CAR-10", CAR, "Table 3",
        "KL consistency beats MSE",
        Sampled(Verifies(picked("car"), picked("car mse_consis"))), "python -m runs.compare car --preset ablation",
        bound(printed.car_ablation, "3", "full", "mse_consis"),
    ),
    Claim(
        "CAR-11", CAR, "Table 4",
        "τ = 30 % is the best initialisation; full-scaled and τ = 50 % fail",
        Sampled(Verifies(picked("car"), picked("car init=random", "car tau=50", "car tau=40", "car tau=20",
                                               "car tau=10", "car tau=0(full-scaled)"))),
        "python -m runs.compare car --preset initialisation",
        bound(printed.car_ablation, "4", "tau=30", "init=random", "tau=50", "tau=40", "tau=20", "tau=10",
              "tau=0(full-scaled)"),
    ),
    Claim(
        "CAR-12", CAR, "Table 5",
        "noise δ = 0.5 is the best",
        Sampled(Verifies(picked("car"), picked("car delta=0", "car delta=0.1", "car delta=0.8"))),
        "python -m runs.compare car --preset noise",
        bound(printed.car_ablation, "5", "delta=0.5", "delta=0", "delta=0.1", "delta=0.8"),
    ),
    Claim(
        "CAR-13", CAR, "Table 5",
        "η = 1 is the best margin",
        Sampled(Verifies(picked("car"), picked("car eta=inf", "car eta=0.95", "car eta=0.98"))),
        "python -m runs.compare car --preset noise",
        bound(printed.car_ablation, "5", "eta=1.0", "eta=inf", "eta=0.95", "eta=0.98"),
    ),
    Claim(
        "CAR-14", CAR, "§4.2, Table 1",
        "4,000 augmented images certify more than 1,000 (four times as many than some)",
        Sampled(Verifies(edited(2_000, 4_000), edited(500, 1_000)), edits_differ=True),
        "python -m runs.compare car --preset augmentation",
        bound(
            printed.car, where(n_aug="4000"), where(n_aug="1000"), ("method", "prune_ratio"), universal=False
        ),
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (
    *(replace(claim, question=Under(claim.question, PIXELWISE)) for claim in _USN),
    *(replace(claim, question=Under(claim.question, LINF, trained=True)) for claim in _NRS),
    *_CAR,
)
"""The claims of each paper, put to its perturbations; the NRSLoss paper verifies at the radius that it trains for."""
