"""Settings of every test: no network, fixed seeds, two threads; and the folder of large fixtures."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

REPOSITORY = Path(__file__).resolve().parents[1]

# Subprocesses import this checkout and tests/support, as pytest does, whether agglo is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPOSITORY / "src"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")])
)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Seed every generator before each test."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden vectors and data sets: ``AGGLO_SHARED``, by default ``shared`` beside the repository."""
    folder = Path(os.environ.get("AGGLO_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"{folder} has no data/; set AGGLO_SHARED to a folder with the fixtures")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of six small images."""
    from support.training import write_images

    return write_images(tmp_path / "images")
