"""Saves and restores a process's random states: what Python, numpy and torch draw next.

Twig draws its own numbers by name (`core/rng.py`) and needs none of these; reward functions may.
"""

import random

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seeds every generator, so that a reward function that draws numbers draws the same in each run."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Tensor]:
    """Returns every generator's state, by name."""
    _, numbers, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple), "what `legacy` asks for"
    _, keys, position, has_gauss, cached = state
    states = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{number}"] = state
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Sets every generator to its state in `states`; those of missing GPUs are ignored."""
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = float(states["numpy.gauss"][0])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda.{number}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{number}"], number)
