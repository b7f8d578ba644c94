"""The head against a whole softmax, on the device; each test has a dtype of its own."""

import pytest
from test_lm_head import *  # noqa: F403

pytestmark = pytest.mark.gpu
PRECISIONS = ["float32"]
