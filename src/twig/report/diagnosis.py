"""Diagnoses a run from its numbers: what is wrong, and which setting to change.

`SYMPTOMS` is a table: a name, a condition on a run's history, what it means, what to change. The report shows
the rows that hold, and training prints them at its end. `LiveWarnings` looks at the rows of a run that is
still training. No torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twig.report import conditions
from twig.report.history import History


@dataclass(frozen=True)
class Symptom:
    """A row of the table; `condition` returns a description of what was seen, or None."""

    name: str
    condition: Callable[[History], str | None]
    meaning: str
    change: str
    is_problem: bool = True  # False: worth knowing


@dataclass(frozen=True)
class Finding:
    """A symptom that a run has: its name, what was seen, what it means, what to change."""

    name: str
    seen: str
    meaning: str
    change: str
    is_problem: bool


def findings(history: History) -> list[Finding]:
    """Returns the symptoms that a run has, problems first, in the order of the table."""
    if not len(history):
        return []
    seen = [(symptom, symptom.condition(history)) for symptom in SYMPTOMS]
    present = [
        Finding(symptom.name, text, symptom.meaning, symptom.change, symptom.is_problem)
        for symptom, text in seen
        if text is not None
    ]
    return sorted(present, key=lambda finding: not finding.is_problem)


def to_try(history: History) -> list[str]:
    """Returns what a finished run suggests to try next, apart from its symptoms."""
    after = history.summary.get("accuracy_after")
    texts = []
    if history.still_rises("reward"):
        texts.append("The reward still rose at the end: more train.max_steps.")
    if after and after["value"] >= _NEARLY_ALL:
        texts.append("Nearly all problems are right: harder ones (task.path, task.digits) teach more.")
    if after:
        texts.append("One run may be luck: the same with train.seed=1 tells gain from chance.")
    return texts


_NEARLY_ALL = 0.9  # of the problems


# ---- the table --------------------------------------------------------------------------------------------

SYMPTOMS = (
    Symptom(
        "All completions are cut off",
        conditions.truncated,
        "A completion that ends before its answer gets no reward, so no group tells right from wrong.",
        "a larger rollout.max_completion_length, or rollout.stop with the text that follows an answer",
    ),
    Symptom(
        "Many completions are cut off",
        conditions.often_truncated,
        "They count as wrong because of their length, whatever they would have said.",
        "a larger rollout.max_completion_length, or algorithm.mask_truncated_completions=true",
        is_problem=False,
    ),
    Symptom(
        "No answer is found",
        conditions.no_answer,
        "The reward sees no answer, right or wrong: the model does not write the form that the task reads.",
        "task.prompt_template or task.system_prompt, to show the form that the task reads",
    ),
    Symptom(
        "Right, but not marked as the answer",
        conditions.not_marked,
        "The model knows more than its answers show; what it learns now is the form of an answer.",
        "task.prompt_template or task.system_prompt; when you report a gain, say how much of it is form",
        is_problem=False,
    ),
    Symptom(
        "No completion has a reward",
        conditions.no_reward,
        "Every reward function answered None, so there is nothing to learn from.",
        "task.reward_file: let a function return a number for each completion that it can judge",
    ),
    Symptom(
        "Rewards cancel each other",
        conditions.cancel,
        "What one reward function gives, the other takes away: their sum rewards nothing.",
        "task.reward_weights, so that what matters more weighs more, or leave one function out",
    ),
    Symptom(
        "A reward function that always says the same",
        conditions.constant_function,
        "A constant adds nothing to any advantage.",
        "task.reward_file: leave the function out, or check that it reads the completions as you meant",
        is_problem=False,
    ),
    Symptom(
        "The reward is always the same",
        conditions.constant_reward,
        "A reward that never differs teaches nothing, whatever the problems are.",
        "task.reward_file: check on a good and a bad completion that the function tells them apart; if it "
        "does, easier or harder problems (task.path)",
    ),
    Symptom(
        "Groups without signal: all right",
        conditions.all_right,
        "If every completion of a group is right, nothing is left to learn: the problems are too easy now.",
        "harder problems (task.path, task.digits), or stop earlier (train.max_steps)",
        is_problem=False,
    ),
    Symptom(
        "Groups without signal: all wrong",
        conditions.all_wrong,
        "Without a right completion in its group, a wrong one cannot be told from a better one.",
        "easier problems, more rollout.num_generations, or a reward that gives part of the points",
    ),
    Symptom(
        "Groups without signal: all alike",
        conditions.all_alike,
        "The completions of a group all succeed or all fail: sampling explores too little.",
        "a higher rollout.temperature, or more rollout.num_generations",
    ),
    Symptom(
        "Steps that change nothing",
        conditions.skipped,
        "No token of the whole batch had credit, so the optimizer took no step.",
        "more rollout.prompts_per_step or rollout.num_generations, or problems of mixed difficulty",
        is_problem=False,
    ),
    Symptom(
        "Replay never happens",
        conditions.no_replay,
        "No completion could be restarted from: none of two tokens or more ended by itself.",
        "a larger rollout.max_completion_length",
    ),
    Symptom(
        "The reward stays flat",
        conditions.flat,
        "The groups have signal, but the steps do not add up to progress.",
        "a larger train.learning_rate (three times, then ten), more train.max_steps, or more "
        "rollout.prompts_per_step if the reward is noisy",
    ),
    Symptom(
        "What was learned is lost again",
        conditions.lost,
        "The steps are too long for this model: it learned, and then it broke.",
        "a smaller train.learning_rate (a third of it); the folder adapter-best has the best",
    ),
    Symptom(
        "The entropy collapsed",
        conditions.entropy_gone,
        "The model answers the same way every time and has stopped exploring before it was right.",
        "a smaller train.learning_rate, a higher rollout.temperature, or algorithm.epsilon_high above "
        "algorithm.epsilon",
    ),
    Symptom(
        "The entropy rises without reward",
        conditions.entropy_up,
        "Sampling turns into noise.",
        "a smaller train.learning_rate",
    ),
    Symptom(
        "Far from the base model",
        conditions.far_from_base,
        "The policy has moved far from the base: it may game the reward, and forget other skills.",
        "a larger algorithm.beta, or a smaller train.learning_rate",
    ),
    Symptom(
        "The gradient is clipped most of the time",
        conditions.clipped,
        "All steps have the same length, whatever the batch says. With Adam that does little harm.",
        "a larger train.max_grad_norm, or a smaller train.learning_rate",
        is_problem=False,
    ),
    Symptom(
        "The learning rate ran out",
        conditions.no_rate,
        "The last third of the samples cost time, and hardly anything was learned from them.",
        "train.lr_scheduler_type=constant, or fewer train.max_steps",
    ),
    Symptom(
        "The best was earlier",
        conditions.best_before,
        "The last adapter is worse than the best one by more than chance.",
        "fewer train.max_steps, or a smaller train.learning_rate; the folder adapter-best has the best",
    ),
    Symptom(
        "Overfitting to the training problems",
        conditions.overfitting,
        "The model solves the training problems, and not others.",
        "more training problems (task.path), or fewer train.max_steps",
    ),
    Symptom(
        "Too few problems to tell",
        conditions.uncertain,
        "A change of this size may be chance.",
        "a larger eval.limit, or several train.seed",
        is_problem=False,
    ),
    Symptom(
        "Sampling and update disagree",
        conditions.gap,
        "The update uses other probabilities than those that the tokens were sampled with.",
        "model.dtype=float32, or model.attn_implementation=eager; in float32 please report it",
    ),
    Symptom(
        "Memory was predicted wrong",
        conditions.mispredicted,
        "The plan does not fit this model or machine.",
        "memory.budget, with room to spare; and please report the model and settings",
        is_problem=False,
    ),
)

PATIENCE = 10  # steps in a row before a warning


class LiveWarnings:
    """Counts the steps in a row that show a symptom, and warns once each time it lasts."""

    def __init__(self) -> None:
        self._lasting = {"cut off": 0, "no signal": 0}
        self._rewards: set[float | None] = set()  # of the steps in a row without signal

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the warnings after a step with the metrics `row`, usually none."""
        cut_off = row.get("completions/clipped_ratio") == 1
        warnings = []
        if self._lasts("cut off", cut_off):
            warnings.append(
                f"all completions of the last {PATIENCE} steps were cut off at their length limit, so their "
                "answers may be missing; set a larger rollout.max_completion_length"
            )
        silent = row.get("frac_reward_zero_std") == 1
        self._rewards = self._rewards | {row.get("reward")} if silent else set()
        # If all are cut off, that is the cause, and the warning above says so.
        if self._lasts("no signal", silent) and not cut_off:
            cause = _cause(row, constant=len(self._rewards) == 1)
            warnings.append(f"no group of the last {PATIENCE} steps had anything to learn from: {cause}")
        return warnings

    def _lasts(self, name: str, here: bool) -> bool:
        self._lasting[name] = self._lasting[name] + 1 if here else 0
        return self._lasting[name] == PATIENCE


def _cause(row: Mapping[str, Any], constant: bool) -> str:
    if row.get("reward") is None:
        return (
            "every reward function answered None; a function in task.reward_file should return a number for "
            "each completion that it can judge"
        )
    if constant and row.get("answers/found") is None:
        return (
            f"every completion got the same reward, {row['reward']:g}; check on a good and a bad completion "
            "that the function in task.reward_file tells them apart, or choose other problems"
        )
    if row.get("answers/found") == 0:
        return (
            "no completion has an answer; show the form that the task reads in task.prompt_template or "
            "task.system_prompt"
        )
    if row["answers/right"] == 1:
        return "all completions are right; choose harder problems (task.path), or stop here"
    if row["answers/right"] == 0:
        return (
            "no completion is right; choose easier problems, more rollout.num_generations, or a reward that "
            "gives part of the points"
        )
    return "the completions of each group all have the same reward; set a higher rollout.temperature"
