import pytest
import torch

# Tiny models: a second thread costs more than it brings, and tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
