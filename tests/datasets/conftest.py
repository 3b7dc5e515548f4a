"""Tiny data sets in the real formats, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets


@pytest.fixture(autouse=True)
def no_ambient_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the user's own cache or data folder."""
    monkeypatch.delenv("CERTPRUNE_DATA", raising=False)
    monkeypatch.setenv("CERTPRUNE_CACHE", str(tmp_path / "ambient-cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("CERTPRUNE_DATA")
    if not folder:
        pytest.skip("CERTPRUNE_DATA is not set")
    return Path(folder)


@pytest.fixture
def pack() -> datasets.Pack:
    """30 random 12×10 RGB images of 3 classes; image i's red corner pixel is i, so that each can be told."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 12, 10, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(30)
    labels = torch.from_numpy(rng.integers(0, 3, 30))
    return datasets.Pack("tiny", "train", torch.from_numpy(images), labels, ("a", "b", "c"), {"mean": [0.5] * 3})
