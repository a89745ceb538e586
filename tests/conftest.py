"""Lets `pytest` in the repository's root find our modules, and makes every test start from the same seed.

WUERSTCHEN_SLOW=1 pytest   also runs the tests marked slow: models of official size, up to 13 GB and a minute or two
each.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs up to 13 GB and a minute or two; runs only with WUERSTCHEN_SLOW=1")
    torch.set_num_threads(1)      # the models are tiny: handing work to a second thread costs more than it saves


def pytest_collection_modifyitems(items):
    if not os.environ.get("WUERSTCHEN_SLOW"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs up to 13 GB and a minute or two: "
                                                        "set WUERSTCHEN_SLOW=1 to run it"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A training script that a test ends early leaves its handlers behind."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)
