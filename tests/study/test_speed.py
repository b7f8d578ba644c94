"""How quickly a run learned: the area under its accuracy over tokens, and the tokens until 90 %."""

import numpy as np
import pytest
from study_runs import write_run

from twig.study.plan import load_study, runs_of
from twig.study.tables import compare_runs, markdown

STUDY = """
base: quickstart
max_tokens: 400
seeds: [1, 2, 3]
variants:
  a: [algorithm.name=grpo]
  b: [algorithm.name=t-spmo]
"""
TENTHS = {n: "1" * n + "0" * (10 - n) for n in range(11)}


@pytest.fixture
def write(tmp_path):
    """Writes finished runs: by variant and seed, how many of ten problems are right at which steps."""
    (tmp_path / "small.yaml").write_text(STUDY)
    planned = runs_of(load_study(tmp_path / "small.yaml"))

    def made(right, tokens, study="first"):
        return [
            write_run(
                run,
                tmp_path / study,
                {step: TENTHS[n] for step, n in right[run.variant, run.seed].items()},
                tokens,
            )
            for run in planned
            if (run.variant, run.seed) in right
        ]

    return made


def test_area_is_the_mean_over_the_budget(write):
    # Evaluations at 0, 100, 300 and 500 tokens; the budget of 400 lies half-way between the last two.
    (run,) = write({("a", 1): {0: 2, 1: 4, 3: 8, 5: 10}}, [100] * 5)
    area = 0.3 * 100 + 0.6 * 200 + (0.8 + 0.9) / 2 * 100
    assert run.curve(400).area().mean() == pytest.approx(area / 400)
    assert run.curve(400).area()[0] == 1.0, "the first problem was always right"
    # A budget at an evaluation ends there, and after a run that stopped early its last value stays.
    assert run.curve(300).area().mean() == pytest.approx((0.3 * 100 + 0.6 * 200) / 300)
    assert run.curve(1000).area().mean() == pytest.approx((0.3 * 100 + 0.6 * 200 + 0.9 * 200 + 500) / 1000)


@pytest.mark.parametrize(
    ("right", "tokens"),
    [
        ({0: 2, 1: 4, 3: 8, 4: 10}, 350.0),  # half-way between 300 and 400
        ({0: 2, 2: 9, 4: 10}, 200.0),  # just reached at an evaluation
        ({0: 2, 1: 10, 2: 3, 4: 10}, 87.5),  # the first of two crossings
        ({0: 10, 1: 2, 4: 4}, 0.0),  # above from the beginning
        ({0: 2, 1: 4, 4: 8}, np.inf),  # never
        ({0: 2, 1: 4, 3: 4, 5: 10}, np.inf),  # at 500 tokens, after the budget
    ],
)
def test_tokens_until_an_accuracy_lie_on_the_line_between_evaluations(write, right, tokens):
    (run,) = write({("a", 1): right}, [100] * 5)
    assert run.curve(400).reached(0.9) == pytest.approx(tokens)


def test_tables_say_area_and_tokens_with_intervals(write):
    slow, quick = {0: 2, 2: 4, 4: 10}, {0: 2, 1: 4, 2: 10, 4: 10}
    right = {("a", seed): slow for seed in (1, 2)} | {("b", seed): quick for seed in (1, 2, 3)}
    comparison = compare_runs(write(right | {("a", 3): {0: 2, 2: 4, 4: 4}}, [100] * 4), 400)
    a, b = comparison["variants"]["a"], comparison["variants"]["b"]
    areas = [(0.3 + 0.7) / 2] * 2 + [(0.3 + 0.4) / 2]
    assert a["area"]["value"] == pytest.approx(np.mean(areas))
    assert a["area"]["low"] < a["area"]["value"] < a["area"]["high"]
    # 0.9 lies at 5/6 of the way; of the three one did not get there, and neither do most of some resamples.
    target = 200 + 200 * 5 / 6
    assert a["tokens_to_target"]["by_seed"] == [pytest.approx(target)] * 2 + [None]
    shown = [a["tokens_to_target"][key] for key in ("value", "low", "high")]
    assert shown == [pytest.approx(target), pytest.approx(target), None]
    assert b["tokens_to_target"]["by_seed"] == [pytest.approx(100 + 100 * 5 / 6)] * 3
    (pair,) = comparison["pairs"]
    assert pair["tokens_ratio"] is None, "a run never got there"
    assert pair["area"]["difference"] == pytest.approx(np.mean(areas) - b["area"]["value"])
    text = markdown(comparison)
    assert "367 (367 to more than 400), 2 of 3 |" in text and "183 (183 to 183), 3 of 3 |" in text
    (pair,) = compare_runs(write(right | {("a", 3): slow}, [100] * 4, "second"), 400)["pairs"]
    ratio = pytest.approx(target / (100 + 100 * 5 / 6))
    assert [pair["tokens_ratio"][key] for key in ("value", "low", "high")] == [ratio] * 3


@pytest.mark.parametrize("right", [{0: 2, 4: 10}, {2: 4, 3: 5, 4: 10}])
def test_without_evaluations_before_and_between_nothing_is_made_up(write, right):
    comparison = compare_runs(write({("a", 1): {0: 2, 1: 4, 4: 10}, ("a", 2): right}, [100] * 4), 400)
    (variant,) = comparison["variants"].values()
    assert (variant["area"], variant["tokens_to_target"]) == (None, None)
    assert "| - | - |" in markdown(comparison) and "*Area*" not in markdown(comparison)
