"""Thousands of tiny steps: does memory stay flat, and does a step stay as quick as at the start?

    python scripts/soak.py                # 5,000 steps, minutes
    python scripts/soak.py --steps 1000

Trains a random model of two layers with everything on that keeps state (replay, several iterations,
checkpoints, completions, evaluations), and prints resident memory and the time of a step as it goes. Exit
status: 0 where the memory grew by less than 2 % and the last steps were no slower than the first by more than
5 %, else 1. Both are taken after a tenth of the steps, when caches are full; the time is the processor's, the
median of a stretch, so that what else the machine does has little to say.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import twig
from twig.common.progress import Progress
from twig.config.load import Settings

MOST_GROWTH, MOST_SLOWDOWN, STRETCH = 0.02, 0.05, 500
CHARACTERS = "0123456789*=+#"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", steps, watch)
    growth, slowdown = verdict(watch.memory, watch.seconds)
    print(f"memory {growth:+.2%}, which is to be below {MOST_GROWTH:+.0%}")
    print(f"time of a step {slowdown:+.2%}, which is to be at most {MOST_SLOWDOWN:+.0%}")
    return int(growth >= MOST_GROWTH or slowdown > MOST_SLOWDOWN)


def verdict(memory: list[float], seconds: list[float]) -> tuple[float, float]:
    """How much the resident memory grew, and how much slower the last steps are than the first, as shares.

    Both lists have an entry a step. The first tenth fills caches and is left out.
    """
    memory, seconds = memory[len(memory) // 10 :], seconds[len(seconds) // 10 :]
    stretch = min(STRETCH, len(seconds) // 3)
    first, last = (statistics.median(part) for part in (seconds[:stretch], seconds[-stretch:]))
    early, late = (max(part) for part in (memory[:stretch], memory[-stretch:]))
    return late / early - 1, last / first - 1


class Watch(Progress):
    """Notes resident memory and processor time of every step."""

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
    """One run of everything that keeps state from step to step."""
    model, tokenizer = tiny_model()
    values = {
        "model": {"name": "random"},
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
        model,
        tokenizer,
        digits,
        [{"prompt": prompt} for prompt in prompts[8:]],
        [{"prompt": prompt} for prompt in prompts[:8]],
        output=folder,
        progress=watch,
    )


def digits(completions: list[str], **kwargs) -> list[float]:
    """The share of digits in each completion."""
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


def tiny_model() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A random model of two layers, and a tokenizer of one token a character."""
    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    return Qwen2ForCausalLM(config).eval(), fast


if __name__ == "__main__":
    sys.exit(main())
