"""Running out of memory: what it looks like on each device, and what can be given back.

Knows nothing of models. Callers leave the `except` block before they try again: the error's frames hold the
tensors that are in the way.
"""

import gc

import torch

# How torch words it where it has no error class of its own (CPU, Apple GPUs).
_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def give_back() -> None:
    """Returns what is no longer used to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
