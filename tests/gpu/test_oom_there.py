"""Memory that is made to run out at each place, on the device; for real it does in test_cuda.py."""

import pytest
from test_out_of_memory import *  # noqa: F403

pytestmark = pytest.mark.gpu

del test_what_running_out_of_memory_looks_like, test_and_what_does_not  # noqa: F821
del test_halves_have_the_same_targets_once_each  # noqa: F821  numpy only
