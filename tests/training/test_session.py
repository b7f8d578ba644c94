"""What a session decides before a run begins."""

import pytest

from twig.training.session import COMPILED_FROM, decode_of


@pytest.mark.parametrize(
    ("chosen", "actual", "steps", "expected"),
    [
        ("auto", "graph", COMPILED_FROM, "compiled"),
        ("auto", "graph", COMPILED_FROM - 1, "graph"),
        ("auto", "plain", COMPILED_FROM, "plain"),  # no CUDA device
        ("graph", "graph", COMPILED_FROM, "graph"),
        ("compiled", "compiled", 1, "compiled"),
        ("plain", "plain", COMPILED_FROM, "plain"),
    ],
)
def test_auto_compiles_captured_steps_in_long_runs_only(chosen, actual, steps, expected):
    assert decode_of(chosen, actual, steps) == expected
