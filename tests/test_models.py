"""Loading models: what is set for them, and what is read from their own files."""

import pytest
import torch

from twig.models import load_model
from twig.settings import Model


@pytest.mark.parametrize(("wanted", "got"), [(2, 2), (None, 1)])
def test_threads_are_set_where_asked_for(wanted, got):
    before = torch.get_num_threads()
    assert before == 1, "tests run on one thread"
    try:
        load_model(Model(name="tiny-arithmetic", num_threads=wanted))
        assert torch.get_num_threads() == got
    finally:
        torch.set_num_threads(before)
