# SPDX-License-Identifier: Apache-2.0
"""Let the tests import the model folder's scripts as the scripts import each other."""

import sys
from pathlib import Path

import pytest
import torch

MODEL = Path(__file__).parents[3] / "models" / "shapes_wan"
sys.path.insert(0, str(MODEL))


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def pipeline(model_folder):
    from generate import load_pipeline

    return load_pipeline(model_folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread_without_denormals():
    # Many small operations: two threads that wait for each other on a busy machine are slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
