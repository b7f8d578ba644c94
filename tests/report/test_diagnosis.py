"""Each symptom is seen in a run that has it, and not in one that only comes near; a healthy run has none."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from twig.cli.display import show_findings
from twig.config.load import Settings
from twig.core.algorithms.registry import shipped
from twig.report.diagnosis import SYMPTOMS, findings
from twig.report.history import History

STEPS = 60
T = np.linspace(0, 1, STEPS)
NOISE = np.random.default_rng(0).normal(size=STEPS)
RISING = 0.4 + 0.4 * T
HEALTHY = {
    "reward": RISING,
    "answers/right": RISING,
    "answers/right_lenient": RISING + 0.05,
    "answers/found": 0.9,
    "completions/clipped_ratio": 0.05,
    "frac_reward_zero_std": 0.3,
    "entropy": 0.6 - 0.3 * T,
    "grad_norm": 0.5 + 0.05 * NOISE,
    "learning_rate": 1e-4 * (1 + np.cos(np.pi * T)) / 2,
    "sampling/logp_gap": 1e-6,
    "replay/groups": 0,
    "tokens/sampled": 1000,
}
UP, DOWN = {"reward": RISING, "answers/right": RISING}, 0.6 + 0.2 * NOISE


def accuracy(value, n=1000, half=0.03, **more):
    return {"value": value, "low": value - half, "high": value + half, "n": n, **more}


def both(right, **more):
    return {"reward": right, "answers/right": right, "answers/right_lenient": right, **more}


def two(first, second):
    """Metrics of two reward functions, and of their sum."""
    names = {"rewards/a/mean": first, "rewards/b/mean": second, "rewards/a/std": 0.4, "rewards/b/std": 0.4}
    return names | {"reward": first + second}


def one(value, deviation):
    """Metrics of one reward function, of a task that cannot tell answers apart from it."""
    return both(value, **{"rewards/a/mean": value, "rewards/a/std": deviation, "answers/found": None})


# Symptom -> (a run that has it, a run that comes near and has not): metrics in place of the healthy ones, or
# settings, summary and dtype.
CASES = {
    "All completions are cut off": (
        {"completions/clipped_ratio": 0.95},
        {"completions/clipped_ratio": np.where(T < 0.5, 1.0, 0.1)},  # at the beginning only
    ),
    "Many completions are cut off": (
        {"completions/clipped_ratio": 0.3},
        {"completions/clipped_ratio": 0.2},
    ),
    "No answer is found": ({"answers/found": 0.01}, {"answers/found": 0.1}),
    "Right, but not marked as the answer": (
        {"answers/right_lenient": RISING + 0.25},
        {"answers/right_lenient": RISING + 0.15},
    ),
    "No completion has a reward": ({"reward": None}, {"reward": [None, *RISING[1:]]}),
    "Rewards cancel each other": (two(RISING, 1 - RISING), two(RISING, 0.5 + 0.1 * NOISE)),
    "A reward function that always says the same": (
        two(RISING, 1 + 0 * T) | {"rewards/b/std": 0.0},
        two(RISING, 1 + 0 * T) | {"rewards/b/std": [*0 * T[1:], 0.1]},
    ),
    "The reward is always the same": (
        one(0.5, 0.0),
        one(0.5, [*0 * T[1:], 0.1]),
    ),
    "Groups without signal: all right": (
        both(0.99, frac_reward_zero_std=0.95),
        both(0.99, frac_reward_zero_std=0.85),
    ),
    "Groups without signal: all wrong": (
        both(0.01, frac_reward_zero_std=0.95),
        both(0.2, frac_reward_zero_std=0.95),
    ),
    "Groups without signal: all alike": (
        {"frac_reward_zero_std": 0.95, **both(0.5)},
        {"frac_reward_zero_std": 0.85},
    ),
    "Steps that change nothing": (
        {"grad_norm": np.where(np.arange(STEPS) % 3 == 0, 0.0, 0.5)},
        {"grad_norm": np.where(np.arange(STEPS) % 5 == 0, 0.0, 0.5)},
    ),
    "Replay never happens": (
        {"settings": ["algorithm.replay.probability=0.5"]},
        {"settings": ["algorithm.replay.probability=0.5"], "replay/groups": [*[0] * (STEPS - 1), 1]},
    ),
    "The reward stays flat": (
        both(0.5 + 0.05 * NOISE),
        both(0.5 + 0.05 * NOISE + 0.1 * T),
    ),
    "What was learned is lost again": (
        both(np.where(T < 0.6, 0.4 + T, 0.4)),
        both(np.where(T < 0.6, 0.4 + 0.5 * T, 0.6)),
    ),
    "The entropy collapsed": (
        {"entropy": np.where(T < 0.5, 0.6, 0.01)},
        both(0.5 + 0.45 * np.sqrt(T), entropy=np.where(T < 0.5, 0.6, 0.01)),  # sure, and right
    ),
    "The entropy rises without reward": (
        both(0.5 - 0.1 * T, entropy=0.5 + T),
        {"entropy": 0.5 + T},  # the reward rises too
    ),
    "Far from the base model": ({"kl": T}, {"kl": 0.4 * T}),
    "The gradient is clipped most of the time": (
        {"grad_norm": 1.0 + 0.3 * NOISE + 0.2},
        {"grad_norm": 1.2 + 0.1 * NOISE, "settings": ["train.max_grad_norm=0"]},  # nothing is clipped
    ),
    "The learning rate ran out": (
        {"learning_rate": np.where(T < 0.6, 1e-4, 0)},
        {"learning_rate": 1e-4 * (1 - T)},
    ),
    "The best was earlier": (
        {"accuracy_best": accuracy(0.8, step=20), "accuracy_after": accuracy(0.7)},
        {"accuracy_best": accuracy(0.72, step=20), "accuracy_after": accuracy(0.7)},
    ),
    "Overfitting to the training problems": (
        {"accuracy_after": accuracy(0.55)},
        {"accuracy_after": accuracy(0.66)},
    ),
    "Too few problems to tell": (
        {"accuracy_before": accuracy(0.7, 50, 0.12), "accuracy_after": accuracy(0.76, 50, 0.12)},
        {"accuracy_before": accuracy(0.7), "accuracy_after": accuracy(0.77)},
    ),
    "Sampling and update disagree": (
        {"sampling/logp_gap": [*[1e-6] * (STEPS - 1), 0.01], "dtype": "torch.float32"},
        {"sampling/logp_gap": np.where(T < 0.45, 3.0, 0.4), "dtype": "torch.bfloat16"},
    ),
    "Memory was predicted wrong": (
        {"predicted_peak_bytes": 2**30, "peak_memory_bytes": 2 * 2**30},
        {"predicted_peak_bytes": 2**29, "peak_memory_bytes": 2**29 + 2**27},
    ),
}
SUMMARY = ("accuracy_before", "accuracy_after", "accuracy_best", "predicted_peak_bytes", "peak_memory_bytes")


def history(changes=None, steps=STEPS):
    """A run of `steps` steps: healthy, but for the `changes`."""
    changes = dict(changes or {})
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
    settings = Settings.from_dict(values, changes.pop("settings", []))
    summary = {key: changes.pop(key) for key in SUMMARY if key in changes}
    dtype = changes.pop("dtype", None)
    columns = HEALTHY | changes
    rows = [{"step": step + 1} for step in range(steps)]
    for name, value in columns.items():
        for step, row in enumerate(rows):
            row[name] = value[step] if np.ndim(value) else value
    rows.insert(1, {"step": 1, "eval/accuracy": 0.5})  # not a training step
    return History(rows, settings, summary, dtype)


def names(run):
    return [finding.name for finding in findings(run)]


def test_a_healthy_run_has_no_symptom():
    assert names(history()) == []


def test_every_symptom_has_both_cases():
    assert list(CASES) == [symptom.name for symptom in SYMPTOMS]


@pytest.mark.parametrize("name", CASES)
def test_a_symptom_is_seen_where_it_is_and_only_there(name):
    fires, near = CASES[name]
    assert name in names(history(fires))
    assert name not in names(history(near))


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=lambda symptom: symptom.name)
def test_what_is_to_be_changed_is_a_setting(symptom):
    values = {"model": {"name": "x"}, "task": {"name": "multiplication"}}
    settings = {
        key for name in shipped() for key in Settings.from_dict(values | {"algorithm": {"name": name}}).flat()
    }
    named = re.findall(r"\b(?:model|lora|task|rollout|algorithm|train|eval|memory|log)\.\w+", symptom.change)
    assert named and set(named) <= settings


def test_a_constant_reward_is_not_called_hard_problems():
    run = history(one(0.0, 0.0) | {"frac_reward_zero_std": 1.0})
    assert [name for name in names(run) if "same" in name or "without signal" in name] == [
        "The reward is always the same"
    ]
    run = history(one(0.0, 0.0) | {"frac_reward_zero_std": 1.0, "answers/found": 0.9})
    assert "Groups without signal: all wrong" in names(run), "answers of a task's own are judged by it"


def test_problems_come_first():
    symptoms = findings(history({"completions/clipped_ratio": 0.3, "kl": 1.0}))
    assert [finding.is_problem for finding in symptoms] == [True, False]


def test_a_run_of_one_step_is_not_judged_by_its_trend_but_by_what_can_be_seen():
    assert names(history(steps=1)) == []
    assert names(history({"completions/clipped_ratio": 1.0}, steps=1)) == ["All completions are cut off"]
    assert names(history(steps=0)) == []


def test_the_middle_third_does_not_count_as_first_or_last():
    run = history({"entropy": np.where((T > 0.34) & (T < 0.66), 100.0, 1.0)})
    assert (run.first("entropy"), run.last("entropy")) == (1.0, 1.0)
    assert np.isnan(run.last("kl"))


def test_words_say_what_was_seen():
    (finding,) = findings(history({"kl": 0.75}))
    assert finding.seen == "the KL divergence from the base is 0.75 nats a token"


def test_half_precision_disagrees_only_if_most_steps_do():
    seen = {"sampling/logp_gap": np.where(T < 0.55, 0.6, 0.1), "dtype": "torch.bfloat16"}
    (finding,) = findings(history(seen))
    assert finding.seen == "in half of the steps a token's log-probability differed by 0.6 nats or more"
    assert names(history({"sampling/logp_gap": None, "dtype": "torch.bfloat16"})) == []


def test_training_prints_the_first_few():
    out, symptoms = io.StringIO(), findings(history({"kl": 0.75, "completions/clipped_ratio": 0.95}))
    show_findings(Console(file=out, width=80), [*symptoms, *symptoms])
    lines = [line for line in out.getvalue().splitlines() if line]
    assert lines[0].startswith("problem  All completions are cut off: 95 % of the completions")
    assert lines[1].strip().startswith("change a larger rollout.max_completion_length")
    assert len(lines) == 7 and lines[6].strip() == "and 1 more, in the report"
    show_findings(Console(file=out), [])
    assert out.getvalue().endswith("in the report\n")
