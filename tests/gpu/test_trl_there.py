"""The gradient of TRL's trainer, on the device. In bfloat16 TRL casts otherwise."""

import pytest
from test_against_trl import *  # noqa: F403

pytestmark = [
    pytest.mark.gpu,
    # TRL 1.16 calls rollout_func, by which the completions come in, experimental.
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]
PRECISIONS = ["float32"]
