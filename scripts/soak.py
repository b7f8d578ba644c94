"""Trains for thousands of small steps, to see whether memory grows or steps become slower.

    python scripts/soak.py                # 5,000 steps, minutes
    python scripts/soak.py --steps 1000

Trains the embedded model with everything that keeps state (replay, several iterations, checkpoints,
completions, evaluations), and prints resident memory and the time of a step. The exit status is 1 if memory
grew by 2 % or more, or if the last steps were more than 5 % slower than the first. The first tenth of the
steps, which fills caches, does not count. Times are medians of processor time, so other processes matter
little.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

import twig
from twig.common.progress import Progress
from twig.config.load import Settings

MOST_GROWTH, MOST_SLOWDOWN, STRETCH = 0.02, 0.05, 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", steps, watch)
    growth, slowdown = verdict(watch.memory, watch.seconds)
    print(f"memory {growth:+.2%} (must be below {MOST_GROWTH:+.0%})")
    print(f"time of a step {slowdown:+.2%} (must be at most {MOST_SLOWDOWN:+.0%})")
    return int(growth >= MOST_GROWTH or slowdown > MOST_SLOWDOWN)


def verdict(memory: list[float], seconds: list[float]) -> tuple[float, float]:
    """Returns by which share memory grew, and by which share the last steps are slower than the first.

    Both lists have an entry per step. The first tenth is left out.
    """
    memory, seconds = memory[len(memory) // 10 :], seconds[len(seconds) // 10 :]
    stretch = min(STRETCH, len(seconds) // 3)
    first, last = (statistics.median(part) for part in (seconds[:stretch], seconds[-stretch:]))
    early, late = (max(part) for part in (memory[:stretch], memory[-stretch:]))
    return late / early - 1, last / first - 1


class Watch(Progress):
    """Records resident memory and processor time of every step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.process = steps, psutil.Process()
        self.memory: list[float] = []
        self.seconds: list[float] = []
        self.began = time.process_time()

    def step(self, step: int, total: int, metrics: dict) -> None:
        now = time.process_time()
        self.seconds.append(now - self.began)
        self.began = now
        self.memory.append(self.process.memory_info().rss)
        if step % (self.steps // 20 or 1) == 0:
            milliseconds = 1000 * statistics.median(self.seconds[-(self.steps // 20 or 1) :])
            print(f"step {step:>6}  {self.memory[-1] / 2**20:8.1f} MiB  {milliseconds:6.1f} ms", flush=True)


def train(folder: Path, steps: int, watch: Progress) -> None:
    """Trains with everything that keeps state from step to step."""
    values = {
        "model": {"name": "tiny-arithmetic"},
        "task": {"name": "custom", "correct_at": 0.3},
        "lora": {"r": 4},
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 8},
        "algorithm": {"num_iterations": 2, "replay": {"probability": 0.5}},
        "train": {"max_steps": steps, "learning_rate": 1e-3, "save_steps": 50},
        "eval": {"steps": 100},
        "log": {"completions_steps": 25},
    }
    prompts = [f"{a}*{b}=" for a in range(10, 60) for b in range(10, 40)]
    twig.train(
        Settings.from_dict(values),
        reward_funcs=digits,
        train_dataset=[{"prompt": prompt} for prompt in prompts[8:]],
        eval_dataset=[{"prompt": prompt} for prompt in prompts[:8]],
        output=folder,
        progress=watch,
    )


def digits(completions: list[str], **kwargs) -> list[float]:
    """Returns the share of digits in each completion."""
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


if __name__ == "__main__":
    sys.exit(main())
