"""USN pruning: channels whose response to semantic perturbations is unstable go first."""

from methods.usn.config import USNConfig
from methods.usn.method import USN, USNOutcome
from methods.usn.metrics import LayerMetrics, Metric, measure
from methods.usn.objective import CollapsedPredictor, CollapsedPredictorWarning
from methods.usn.schedule import Progressive
from methods.usn.wasserstein import WassersteinTarget

__all__ = [
    "USN",
    "CollapsedPredictor",
    "CollapsedPredictorWarning",
    "LayerMetrics",
    "Metric",
    "Progressive",
    "USNConfig",
    "USNOutcome",
    "WassersteinTarget",
    "measure",
]
