"""What a session decides before a run begins, and tells when it resumes."""

import pytest
from small_runs import Heard, ask_to_stop, at

from twig.common.progress import Progress
from twig.runs.reader import read_metrics
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


def test_a_resumed_run_tells_the_display_its_tokens_so_far(run):
    class Told(Progress):
        def resumed(self, totals):
            self.totals = dict(totals)

    folder = run("run", progress=Heard(step=at(4, ask_to_stop))).folder
    sampled = sum(row.get("tokens/sampled", 0) for row in read_metrics(folder))
    told = Told()
    run("run", resume=True, progress=told)
    assert told.totals["tokens_sampled"] == sampled > 0
