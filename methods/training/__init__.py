"""Training shared by all methods: the loop, its configuration, objectives, penalties and task losses."""

from methods.training.adversarial import Adversarial
from methods.training.checkpoint import Checkpoint, CheckpointError
from methods.training.config import TrainingConfig
from methods.training.crown_ibp import CROWNIBP
from methods.training.fast_ibp import ReLUBalance, Tightness, fast_ibp
from methods.training.fgsm import FGSM
from methods.training.history import EpochRecord, History
from methods.training.ibp import IBP
from methods.training.loop import Callback, TrainingDiverged, train
from methods.training.losses import CrossEntropy, Custom, KeypointEuclidean, KeypointMSE, TaskLoss, resolve
from methods.training.natural import Natural
from methods.training.objective import Objective, Progress
from methods.training.pgd import PGD
from methods.training.regularised import Regularised, Regulariser
from methods.training.stability import NRSLoss, RSLoss
from methods.training.trades import TRADES

__all__ = [
    "CROWNIBP",
    "FGSM",
    "IBP",
    "PGD",
    "TRADES",
    "Adversarial",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "CrossEntropy",
    "Custom",
    "EpochRecord",
    "History",
    "KeypointEuclidean",
    "KeypointMSE",
    "NRSLoss",
    "Natural",
    "Objective",
    "Progress",
    "RSLoss",
    "ReLUBalance",
    "Regularised",
    "Regulariser",
    "TaskLoss",
    "Tightness",
    "TrainingConfig",
    "TrainingDiverged",
    "fast_ibp",
    "resolve",
    "train",
]
