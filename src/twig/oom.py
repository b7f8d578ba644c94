"""Running out of memory: what it looks like on each device, and what can be given back.

Knows nothing of models. Callers leave the `except` block before they try again: the error's frames hold the
tensors that are in the way.
"""

import gc

import torch

# How torch words it where it has no error class of its own (CPU, Apple GPUs).
_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine is out of memory, or was raised because of that.

    A CUDA graph whose capture ends early raises an error of its own, in whose context is the cause.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(words in str(error).lower() for words in _WORDS):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


def give_back() -> None:
    """Returns what is no longer used to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
