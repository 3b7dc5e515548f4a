"""Training shared by all methods: the loop, its configuration, objectives and task losses."""

from methods.training.checkpoint import Checkpoint, CheckpointError
from methods.training.config import TrainingConfig
from methods.training.history import EpochRecord, History
from methods.training.ibp import IBP
from methods.training.loop import Callback, TrainingDiverged, train
from methods.training.losses import CrossEntropy, Custom, KeypointEuclidean, KeypointMSE, TaskLoss, resolve
from methods.training.natural import Natural
from methods.training.objective import Objective, Progress

__all__ = [
    "IBP",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "CrossEntropy",
    "Custom",
    "EpochRecord",
    "History",
    "KeypointEuclidean",
    "KeypointMSE",
    "Natural",
    "Objective",
    "Progress",
    "TaskLoss",
    "TrainingConfig",
    "TrainingDiverged",
    "resolve",
    "train",
]
