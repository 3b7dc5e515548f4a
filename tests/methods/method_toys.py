"""Small networks and data for the tests of methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.training import TrainingConfig

FAST = TrainingConfig(optimizer="adam", lr=0.02, schedule="constant")


class Residual(nn.Module):
    """A residual block, a depthwise convolution and a concatenation: every kind of coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.branch(x) + x)
        x = self.depthwise(x)
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)))


def residual(seed: int = 0) -> Residual:
    """A `Residual` with normalisation statistics and affine parameters that are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Residual()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.normal_(0, 0.3)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def mlp(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """2 -> 16 -> 16 -> 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU(),
            nn.Linear(16, 2),
        )  # fmt: skip


def points(n: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Linearly separable points in [0, 1]^2 with a margin, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4 * n, 2, generator=generator)
    gap = x[:, 0] - x[:, 1]
    x = x[gap.abs() > 0.2][:n]
    return x, (x[:, 0] > x[:, 1]).long()


class Shuffled:
    """Batches whose order is a function of (seed, epoch), like those of the data sets."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 32, seed: int = 0) -> None:
        self.x, self.y, self.size, self.seed, self.epoch = x, y, size, seed, 0
        self.told: list[int] = []

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for index in torch.randperm(len(self.x), generator=generator).split(self.size):
            yield self.x[index], self.y[index]


def images(n: int = 24, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 1x6x6 images whose class (of three) is the brightest third."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, :, 2 * label : 2 * label + 2] += 0.6
    return list(zip(x.split(8), y.split(8)))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks hold exactly the same numbers."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
