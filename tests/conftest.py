"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two threads on a busy machine can be ten times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data sets that CERTPRUNE_DATA names; tests that ask for it are skipped without it."""
    folder = os.environ.get("CERTPRUNE_DATA")
    if not folder:
        pytest.skip("set CERTPRUNE_DATA to a folder of data sets")
    return Path(folder)
