"""Each family against its own forward, on the device."""

import pytest
from test_families import *  # noqa: F403

pytestmark = pytest.mark.gpu

# What is refused is refused before anything is computed; whole runs are in test_cuda.py.
del test_the_page_of_models_is_current  # noqa: F821
del test_the_trie_engine_refuses_it_by_name  # noqa: F821
del test_a_layer_without_linear_modules_is_named  # noqa: F821
del test_a_layer_that_needs_more_than_it_is_given_is_refused  # noqa: F821
del test_a_whole_run_is_refused_and_with_the_plain_engine_it_trains  # noqa: F821
