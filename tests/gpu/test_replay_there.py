"""Replay in the trainer, on the device."""

import pytest
from test_trainer import (
    test_a_restart_is_sampled_as_a_prompt_of_its_slot_would_be,
    test_a_restart_takes_a_slot_of_the_next_step,
    test_rewards_see_the_prefix_and_the_continuation,
    test_the_gradient_of_a_restart_is_that_of_its_longer_prompt,
)

pytestmark = pytest.mark.gpu
__all__ = [
    "test_a_restart_is_sampled_as_a_prompt_of_its_slot_would_be",
    "test_a_restart_takes_a_slot_of_the_next_step",
    "test_rewards_see_the_prefix_and_the_continuation",
    "test_the_gradient_of_a_restart_is_that_of_its_longer_prompt",
]
