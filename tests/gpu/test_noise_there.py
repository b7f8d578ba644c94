"""From uniform numbers to tokens, on the device; each test has a dtype of its own."""

import pytest

pytestmark = pytest.mark.gpu
PRECISIONS = ["float32"]
