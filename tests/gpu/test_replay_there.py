"""Replay in the trainer, on the device."""

import pytest

pytestmark = pytest.mark.gpu
