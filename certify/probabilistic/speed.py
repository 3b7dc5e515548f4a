"""What sampling costs beside the plain model: for benchmarks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify.arithmetic import full_float32
from certify.perturbations import Perturbation
from certify.probabilistic.sampling import estimate
from certify.probabilistic.transforms import Transform, Uniform, for_image


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Images a second: `sampling` in `estimate`, `inference` by the plain model, `transform` by the transform alone."""

    sampling: float
    inference: float
    transform: float

    @property
    def ratio(self) -> float:
        """Sampling against plain inference; 1 means that transforming, counting and stopping cost nothing."""
        return self.sampling / self.inference

    @property
    def ratio_without_transform(self) -> float:
        """The same with the transform's own time taken out: what this package's machinery costs."""
        return self.sampling / (1 / (1 / self.inference + 1 / self.transform))


@full_float32()
def throughput(
    model: nn.Module,
    x: Tensor,
    transform: Transform | Perturbation,
    *,
    n: int = 2995,
    batch: int = 256,
    repeats: int = 5,
) -> Throughput:
    """Measure `estimate` on one image against the plain model and the transform on batches of the same size.

    The three are timed in turn `repeats` times and the fastest of each counts, which is what a busy machine disturbs
    least. `x` is (1, C, H, W). All three in full float32, as `estimate` is.
    """
    with torch.no_grad():
        y = model(x[:1]).argmax(1)
        source: Transform = Uniform(transform, x[:1]) if isinstance(transform, Perturbation) else transform
        one = for_image(source, 0)
        generator = torch.Generator(device=x.device).manual_seed(0)
        sizes = [min(batch, n - at) for at in range(0, n, batch)]
        rows = x[:1].expand(batch, *x.shape[1:])
        drawn = one(rows, generator=generator)

        def sample() -> float:
            return float(
                estimate(model, x[:1], y, source, eps=0.5, n_max=n, batch=batch, early_stop=False).seconds.sum()
            )

        def plain(call: Callable[[Tensor], Tensor], given: Tensor) -> float:
            start = time.perf_counter()
            for size in sizes:
                last = call(given[:size])
            last.sum().item()  # waits for the device
            return time.perf_counter() - start

        best = [float("inf")] * 3
        for _ in range(repeats):
            times = (
                sample(),
                plain(model, drawn),
                plain(lambda given: one(given, generator=generator), rows),
            )
            best = [min(a, b) for a, b in zip(best, times)]
    return Throughput(*(n / seconds for seconds in best))
