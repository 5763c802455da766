import gc
import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # Several threads add in another order from run to run, and gain nothing on models this small.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick_garbage_collection():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def counted_trainings():
    from tiny import CountTrainings

    CountTrainings.trainings, CountTrainings.interrupt_at = 0, None


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
