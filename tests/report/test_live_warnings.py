"""Warnings while a run trains: each once, when its time has come, with the setting to change."""

import pytest

from twig.report.diagnosis import PATIENCE, LiveWarnings

GOOD = {
    "reward": 0.4,
    "frac_reward_zero_std": 0.5,
    "answers/right": 0.4,
    "answers/found": 0.8,
    "completions/clipped_ratio": 0.2,
}
NO_SIGNAL = GOOD | {"frac_reward_zero_std": 1.0}


def said(rows):
    watch = LiveWarnings()
    return [text for row in rows for text in watch.warnings(row)]


def test_a_run_that_learns_hears_nothing():
    assert said([GOOD] * 100) == []


@pytest.mark.parametrize(
    "row, names",
    [
        (GOOD | {"completions/clipped_ratio": 1.0}, "rollout.max_completion_length"),
        (NO_SIGNAL | {"completions/clipped_ratio": 1.0}, "rollout.max_completion_length"),
        (NO_SIGNAL | {"reward": None}, "task.reward_file"),
        (NO_SIGNAL | {"answers/found": 0.0}, "task.prompt_template"),
        (NO_SIGNAL | {"answers/right": 1.0}, "all completions are right"),
        (NO_SIGNAL | {"answers/right": 0.0}, "rollout.num_generations"),
        (NO_SIGNAL | {"answers/right": 0.0, "answers/found": None}, "task.reward_file"),
        (NO_SIGNAL, "rollout.temperature"),
    ],
)
def test_what_lasts_is_said_once_with_the_setting_to_change(row, names):
    assert said([row] * (PATIENCE - 1)) == []
    (text,) = said([row] * 3 * PATIENCE)
    assert names in text
    interrupted = [row] * (PATIENCE - 1) + [GOOD]
    assert said(interrupted * 5) == [], "in a row"
    assert len(said(([row] * PATIENCE + [GOOD]) * 2)) == 2, "and again when it comes back"


def test_a_row_of_a_task_that_finds_no_answers_is_understood():
    row = {key: value for key, value in NO_SIGNAL.items() if key != "answers/found"}
    assert len(said([row] * PATIENCE)) == 1


def test_rewards_that_differ_from_step_to_step_are_not_called_constant():
    row = {key: value for key, value in NO_SIGNAL.items() if key != "answers/found"}
    rows = [row | {"answers/right": 0.0, "reward": step / 10} for step in range(PATIENCE)]
    (text,) = said(rows)
    assert "task.reward_file" not in text and "easier problems" in text
