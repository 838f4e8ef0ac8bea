"""Models of a few thousand parameters with bottleneck adapters that are not near the identity."""

import pytest
import stock_peft
import torch

stock_peft.patch()


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
