"""From uniform numbers to tokens, on the device; each test has a dtype of its own."""

import pytest
from test_rng import (
    test_a_large_vocabulary,
    test_a_row_does_not_depend_on_its_neighbours,
    test_borders_worked_out_by_hand,
    test_first_tokens_of_a_model_match_its_probabilities,
    test_frequencies_match_the_probabilities,
    test_invert_equals_a_loop_over_the_vocabulary,
    test_no_number_falls_off_either_end,
    test_tokens_that_follow_each_other_are_independent,
)

pytestmark = pytest.mark.gpu
PRECISIONS = ["float32"]
__all__ = [
    "test_a_large_vocabulary",
    "test_a_row_does_not_depend_on_its_neighbours",
    "test_borders_worked_out_by_hand",
    "test_first_tokens_of_a_model_match_its_probabilities",
    "test_frequencies_match_the_probabilities",
    "test_invert_equals_a_loop_over_the_vocabulary",
    "test_no_number_falls_off_either_end",
    "test_tokens_that_follow_each_other_are_independent",
]
