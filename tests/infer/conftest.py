"""Draws are compared with numbers, so that sums must not depend on the number of cores."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(unchanged_global_state: None) -> Iterator[None]:
    """Run the test on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
