"""Warnings while a run trains: nothing to learn from for a while, and why. Each names the setting to change.

Looks at rows of metrics only. Knows nothing of training.
"""

from collections.abc import Mapping
from typing import Any

PATIENCE = 10  # steps in a row before a warning


class Watch:
    """Counts the steps in a row that show a symptom, and warns once each time it lasts."""

    def __init__(self) -> None:
        self._lasting = {"cut off": 0, "no signal": 0}

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What there is to say after a step with the metrics `row`, mostly nothing."""
        cut_off = row.get("completions/clipped_ratio") == 1
        found = []
        if self._lasts("cut off", cut_off):
            found.append(
                f"all completions of the last {PATIENCE} steps were cut off at their length limit, so their "
                "answers may be missing; write a larger rollout.max_completion_length"
            )
        # Where all are cut off that is the cause, and has been said.
        if self._lasts("no signal", row.get("frac_reward_zero_std") == 1) and not cut_off:
            found.append(f"no group of the last {PATIENCE} steps had anything to learn from: {_cause(row)}")
        return found

    def _lasts(self, name: str, here: bool) -> bool:
        self._lasting[name] = self._lasting[name] + 1 if here else 0
        return self._lasting[name] == PATIENCE


def _cause(row: Mapping[str, Any]) -> str:
    if row.get("reward") is None:
        return (
            "every reward function answered None; see task.reward_file, which should give a number for what "
            "it can judge"
        )
    if row.get("answers/found") == 0:
        return (
            "no answer is found in any completion; show the form that the task reads in "
            "task.prompt_template or task.system_prompt"
        )
    if row["answers/right"] == 1:
        return "all completions are right; choose harder problems (task.path), or stop here"
    if row["answers/right"] == 0:
        return (
            "no completion is right; choose easier problems, more rollout.num_generations, or a reward that "
            "gives part of the points"
        )
    return "the completions of each group all have the same reward; write a higher rollout.temperature"
