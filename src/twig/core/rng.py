"""Random numbers by name: functions of a seed, a stream and counters, never of what was drawn before.

Resuming, waves, branches and showing a step's credit again rest on this. Numpy only.
"""

import numpy as np

SAMPLING, CREDIT, REPLAY, DATA, ANSWERS, CURRICULUM = range(6)  # streams of random numbers that never meet


def generator(seed: int, stream: int, *counter: int) -> np.random.Generator:
    """Returns a random generator that is a function of its arguments only (at most three counters)."""
    block = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(counter=block, key=[seed, stream]))


def uniforms(seed: int, step: int, slot: int, completion: int, length: int) -> np.ndarray:
    """Returns the uniform numbers in [0, 1) of one completion; entry t draws the token at position t."""
    return generator(seed, SAMPLING, completion, slot, step).random(length)
