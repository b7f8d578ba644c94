"""Run folders made up for tests: metrics, completions and results without any training."""

import json

import numpy as np

from twig.config.load import Settings
from twig.runs.folder import RunLog

MINIMAL = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
ACCURACY = {"value": 0.45, "low": 0.42, "high": 0.48, "n": 1000, "found": 1.0, "right_lenient": 0.5}
WORDS = ["the ", "sum ", "is ", "12", "\n", "#", "7", "<eos>"]


def group_rows(rng, size=6, length=9, prompt="1+2=", index=0, words=WORDS, rewards=(0.0, 1.0)):
    """Rows of the completions file for one group whose completions fork here and there."""
    rows = []
    for number in range(size):
        ids = [0, 1, *rng.integers(2, len(words) - 1, size=int(rng.integers(1, length))).tolist()]
        ids = ids if number % 3 else rows[-1]["token_ids"] if rows else ids
        reward = float(rng.choice(rewards))
        rows.append(
            {
                "prompt_index": index,
                "completion_index": number,
                "prompt": prompt,
                "completion": "".join(words[i] for i in ids),
                "prefix_length": 0,
                "token_ids": ids,
                "tokens": [words[i] for i in ids],
                "finished": bool(number % 4),
                "reward": None if number == size - 1 else reward,
                "right": reward == 1.0,
            }
        )
    return rows


def metrics_row(step, level=0.5):
    """A step's metrics, of a run that learns."""
    reward = level + 0.3 * (1 - np.exp(-step / 30)) + 0.05 * np.sin(7 * step)
    row = {"reward": reward, "answers/right": reward, "entropy": 1 / step, "completions/mean_length": 20.0}
    row |= {"completions/clipped_ratio": 0.02, "frac_reward_zero_std": 0.3, "grad_norm": 0.5}
    row |= {"tokens/sampled": 2560, "tokens/selected": 64, "tokens/nodes_run": 128, "learning_rate": 1e-3}
    row |= {
        "sampling/logp_gap": 1e-6,
        "memory/peak_bytes": 5e8,
        "memory/predicted_peak_bytes": 52e7,
        "replay/groups": 0,
    }
    return row | {
        "time/sample": 0.6,
        "time/reward": 0.01,
        "time/credit": 0.01,
        "time/update": 0.2,
        "time/step": 0.9,
    }


def write_run(folder, overrides=(), steps=40, saved=(1, 20), seed=0, groups=2, **made):
    """A finished run in `folder`; `made` goes to `group_rows`. Returns the folder."""
    settings = Settings.from_dict(MINIMAL, [*overrides, f"train.seed={seed}"])
    log = RunLog.create(folder, settings)
    rng = np.random.default_rng(seed)
    rows = [{"step": step, **metrics_row(step, 0.4 + 0.02 * seed)} for step in range(1, steps + 1)]
    rows.insert(steps // 2, {"step": steps // 2, "eval/accuracy": 0.6})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    for step in saved:
        log.save_completions(step, [row for i in range(groups) for row in group_rows(rng, index=i, **made)])
    after = ACCURACY | {"value": 0.8, "low": 0.77, "high": 0.83}
    log.save_summary(
        {
            "status": "finished",
            "steps": steps,
            "accuracy_before": ACCURACY,
            "accuracy_after": after,
            "accuracy_best": after | {"step": steps},
            "tokens_sampled": 2560 * steps,
            "tokens_selected": 64 * steps,
            "nodes_run": 300 * steps,
            "peak_memory_bytes": 5e8,
            "predicted_peak_bytes": 52e7,
            "seconds": 0.9 * steps,
            "algorithm": settings.algorithm.name,
            "task": settings.task.name,
        }
    )
    return folder
