"""Chooses the loop that samples tokens: one decision, for the sampler and for the memory plan.

`model` calls the whole model, `layers` calls its layers one by one, `steps` replays captured decode steps.
Imports no torch.
"""

from collections.abc import Sequence
from typing import Literal

Loop = Literal["model", "layers", "steps"]


def resolve_decode(chosen: str, device_kind: str) -> str:
    """Returns what `rollout.decode` stands for on a device: `auto` is graph on CUDA and plain elsewhere.

    >>> resolve_decode("auto", "cuda"), resolve_decode("auto", "cpu"), resolve_decode("compiled", "cuda")
    ('graph', 'plain', 'compiled')
    """
    if chosen != "auto":
        return chosen
    return "graph" if device_kind == "cuda" else "plain"


def choose_loop(engine: str, decode: str, stop: Sequence[str]) -> Loop:
    """Returns the loop of an engine under a resolved `rollout.decode`; stop texts are read after each token.

    >>> choose_loop("trie", "graph", ()), choose_loop("trie", "graph", ["."]), choose_loop("plain", "", ())
    ('steps', 'layers', 'model')
    """
    if engine == "plain":
        return "model"
    return "layers" if stop or decode == "plain" else "steps"
