"""Small runs for tests: their settings, their data, a reward, and what is left of them on disk.

The fixtures `settings`, `run` and `whole` of conftest.py train them.
"""

import re
import signal

from pyarrow import parquet

import twig
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.runs import checkpoint
from twig.runs.reader import read_evaluations, read_metrics, read_summary

PROMPTS = {"12*3=": "1", "9+8=": "3", "abc?": "5", "#=": "7", "0,1,": "9"}
TRAIN = [{"prompt": prompt, "wanted": digit} for prompt, digit in PROMPTS.items()]
EVAL = [{"prompt": text, "wanted": "2"} for text in ("4*4=", "x?", "77+1=")]
STEPS = 6
MACHINE = ("seconds", "peak_memory_bytes", "predicted_peak_bytes")  # of summary.json


def digits(completions, **kwargs):
    """The share of digits in a completion: it varies from one to the next, whatever the model."""
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


def small_settings(base, *overrides):
    """The settings of a small run on the model in folder `base`, with overrides on top."""
    values = {
        "model": {"name": str(base)},
        "task": {"name": "custom"},
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 7},
        "train": {"max_steps": STEPS, "learning_rate": 0.05, "save_steps": 2},
        "eval": {"steps": 2},
        "log": {"completions_steps": 1},
    }
    return Settings.from_dict(values, overrides)


def train_small(settings, output, **given):
    """Trains, with this module's reward and data unless others are given."""
    given = {"reward_funcs": digits, "train_dataset": TRAIN, "eval_dataset": EVAL} | given
    return twig.train(settings, output=output, **given)


def rows_of(folder):
    """The metrics but for those that a clock or the machine's memory decides."""
    machine = ("time/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in read_metrics(folder)]


def completions_of(folder, step):
    return parquet.read_table(folder / "completions" / f"step-{step}.parquet").to_pylist()


def record(folder, steps=STEPS):
    """All that a run leaves behind and that must not depend on where it was broken off."""
    tensors, state = checkpoint.load(checkpoint.newest_valid(folder / "checkpoints")[0])
    del state["standing"]["totals"]["seconds"]
    for name in ("settings", "contents"):  # the same run may be asked for in several ways
        state.pop(name, None)
    del tensors["random"]["python"]  # the checks of types, which only tests have, draw from it
    summary = {k: v for k, v in read_summary(folder).items() if k not in MACHINE}
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "tensors": {f: {k: v.numpy().tobytes() for k, v in t.items()} for f, t in tensors.items()},
        "state": state,
        "metrics": rows_of(folder),
        "evaluations": read_evaluations(folder),
        "completions": [completions_of(folder, step) for step in range(1, steps + 1)],
        "summary": summary,
    }


class Heard(Progress):
    """What a run says; `on` holds what to do when a call of that name is heard (the step is an argument)."""

    def __init__(self, **on):
        self.on, self.said = on, []

    def _hear(self, name, *arguments):
        self.said.append(" ".join(map(str, (name, *arguments))))
        self.on.get(name, lambda *arguments: None)(*arguments)

    def phase(self, name, total=None):
        self._hear("phase", name)

    def advance(self, count=1):
        self._hear("advance")

    def step(self, step, total, metrics):
        self._hear("step", step)

    def evaluation(self, when, result):
        self._hear("evaluation", when)

    def message(self, text):
        self._hear("message", text)

    def heard(self, pattern):
        """How often something was said that matches."""
        return sum(re.search(pattern, said) is not None for said in self.said)


def ask_to_stop(*arguments):
    signal.raise_signal(signal.SIGINT)


def at(step, action):
    """The action, at one step only."""

    def act(now):
        if now == step:
            action()

    return act
