"""The engine against its twins, on the device."""

import pytest
from test_engine import *  # noqa: F403

pytestmark = pytest.mark.gpu

del test_the_operations_of_an_update_are_those_that_torch_counts  # noqa: F821  the same on any device
