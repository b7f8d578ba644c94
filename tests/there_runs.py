"""Trains, evaluates and samples on the device of `there.py`, in a process of its own.

python there_runs.py equal      # steps and evaluations are those of a CPU
python there_runs.py waits      # prints how often a decode step waits for the device
python there_runs.py FAULT      # with a fault of `FAULTS` in the engine: raises
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numerics
import numpy as np
import there
import tiny
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

sys.path.append(str(Path(__file__).parent / "training"))

from test_trainer import build_trainer

from twig.engine.decoder import Decoder
from twig.engine.sampler import Request, SamplingParams, sample
from twig.evaluation.evaluate import evaluate_policy

RUNS = {
    "replay": [],
    "grpo with the KL, twice on a batch": [
        *("algorithm.name=grpo", "algorithm.beta=0.1", "algorithm.num_iterations=2")
    ],
    "a ratio per completion": ["algorithm.name=gspo", "algorithm.num_iterations=2"],
    "few tokens": ["algorithm.name=s-grpo", "algorithm.alpha=2", "rollout.redraw=1"],
}

CHECKPOINTED = ("replay", "grpo with the KL, twice on a batch")


def inside(device):
    return there.Device() if device == "there" else nullcontext()


def steps(device, overrides, checkpointed, count=2):
    """What some steps and an evaluation come to, and the adapter after them."""
    # layers that run again leave `casts`
    precision = numerics.SINGLE if checkpointed else numerics.EXACT
    with inside(device), numerics.use(precision, device), numerics.casts():
        trainer = build_trainer("train.optim=sgd", *overrides)
        trainer.policy.checkpoint_layers = checkpointed
        rows = [trainer.step(step)[1] for step in range(1, count + 1)]
        params = replace(trainer.sampling, wave_size=8)
        measured, _ = evaluate_policy(trainer.policy, trainer.tokenizer, trainer.task, params, limit=12)
        adapter = {name: p.detach().cpu() for name, p in trainer.policy.parameters.items()}
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return [*rows, measured.as_dict()], adapter


def equal() -> None:
    for name, overrides in RUNS.items():
        for checkpointed in (False, True) if name in CHECKPOINTED else (False,):
            bound = numerics.SINGLE.value if checkpointed else numerics.EXACT.value
            rows, adapter = steps("there", overrides, checkpointed)
            expected, expected_adapter = steps("cpu", overrides, checkpointed)
            for row, other in zip(rows, expected, strict=True):
                assert row.keys() == other.keys()
                for key in row:
                    np.testing.assert_allclose(row[key], other[key], atol=bound, err_msg=f"{name}: {key}")
            for key, value in adapter.items():
                torch.testing.assert_close(value, expected_adapter[key], rtol=bound, atol=bound, msg=name)
            assert any(row["grad_norm"] > 0 for row in rows[:-1]), "a comparison of nothing"


def waits() -> None:
    """Prints waits for each decode step of a wave of six: the difference of a longer and a shorter wave."""
    with inside("there"), numerics.use(numerics.SINGLE, "there"), torch.no_grad():
        counts = {}
        for engine in ("trie", "plain"):
            for greedy in (False, True):
                policy = tiny.build_policy(engine=engine, layers=[3], suppress_tokens=[tiny.END])
                spent = []
                for longest in (4, 12):
                    params = SamplingParams(
                        (tiny.END,),
                        lambda ids: [""] * len(ids),
                        greedy=greedy,
                        wave_size=6,
                        record=not greedy,
                    )
                    there.waits.clear()
                    sample(policy, [Request(np.arange(3, 8), 6, longest, 0)], params, step=1)
                    spent.append(there.waits.total())
                counts[f"{engine}, {'evaluation' if greedy else 'training'}"] = (spent[1] - spent[0]) / 8
    sys.stdout.write(json.dumps(counts))


def _mask_on_the_cpu() -> None:
    masks = Decoder.masks
    Decoder.masks = lambda *arguments: {
        window: mask if mask is None else mask.cpu() for window, mask in masks(*arguments).items()
    }


def _index_on_the_cpu() -> None:
    head = tiny.ENGINES["trie"]._tensor
    tiny.ENGINES["trie"]._tensor = lambda self, array: head(self, array).cpu()


def _positions_on_the_cpu() -> None:
    rotations = Decoder.rotations
    Decoder.rotations = lambda self, positions: rotations(self, positions.cpu())


FAULTS = {"mask": _mask_on_the_cpu, "index": _index_on_the_cpu, "positions": _positions_on_the_cpu}


if __name__ == "__main__":
    torch.set_num_threads(1)
    there.register()
    # Layers that run again in a backward pass do so on this thread, which has the device, and to their end:
    # torch stops them early by an exception, which would end the process.
    torch.autograd.set_multithreading_enabled(False)
    with set_checkpoint_early_stop(False):
        FAULTS.get(sys.argv[1], lambda: None)()
        {"waits": waits}.get(sys.argv[1], equal)()
