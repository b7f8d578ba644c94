"""The credit of a step: an algorithm's weights on every group, divided and selected over all of them."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from twig.common.errors import UserError
from twig.common.python_files import FileError
from twig.core.algorithms.base import Algorithm, Credit, Scale, Step
from twig.core.trie import PrefixTrie
from twig.core.types import Group


@dataclass(frozen=True)
class Scored:
    """A group whose completions have rewards, merged into a trie, with the credit of its nodes.

    `slot` is its place among the groups of the step.
    """

    group: Group
    trie: PrefixTrie
    credit: Credit
    slot: int = 0


def assign(
    algorithm: Algorithm, tries: Sequence[PrefixTrie], rngs: Sequence[np.random.Generator], num_prompts: int
) -> tuple[list[Credit], Scale]:
    """Returns the credit of each group of a step with `num_prompts` prompts, and the scale that it was given.

    `tries` and `rngs` have one entry per group in which a completion has a reward. Raises UserError if the
    algorithm's weights are not one finite number per node.
    """
    with _failing(algorithm):
        raw = [algorithm.weights(trie, rng) for trie, rng in zip(tries, rngs, strict=True)]
    for trie, credit in zip(tries, raw, strict=True):
        _check(algorithm, trie, credit)
    step = Step(tries, raw, num_prompts)
    with _failing(algorithm):
        scale = algorithm.scale(step)
    if not (np.isfinite(scale.divisor) and scale.divisor > 0):
        raise UserError(
            f"algorithm {algorithm.name}", f"its divisor is {scale.divisor}", "Return a finite number above 0"
        )
    return scale.apply(step), scale


def assign_one(algorithm: Algorithm, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
    """Returns the credit of a group that is alone in its step.

    >>> from twig.core.algorithms.t_spmo import TSpmo
    >>> trie = PrefixTrie.build([[1], [1], [2]], [1.0, 1.0, 0.0])
    >>> assign_one(TSpmo(), trie, np.random.default_rng(0)).plus.round(3).tolist()
    [0.0, 0.167, 0.0]
    """
    credits, _ = assign(algorithm, [trie], [rng], 1)
    return credits[0]


@contextmanager
def _failing(algorithm: Algorithm) -> Iterator[None]:
    """Turns an exception in a user's algorithm into a FileError that says where it was raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(algorithm).__module__.startswith("twig."):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        raise FileError(
            f"algorithm {algorithm.name}",
            f"it raised at {frame.filename}:{frame.lineno}: {type(error).__name__}: {message}",
            traceback_text="".join(traceback.format_exception(error)),
        ) from error


def _check(algorithm: Algorithm, trie: PrefixTrie, credit: Credit) -> None:
    for name in ("plus", "minus", "kl"):
        weight = np.asarray(getattr(credit, name))
        sign_is_right = (weight <= 0).all() if name == "minus" else (weight >= 0).all()
        if (
            weight.shape != (len(trie),)
            or not np.isfinite(weight).all()
            or weight[0] != 0
            or not sign_is_right
        ):
            raise UserError(
                f"algorithm {algorithm.name}",
                f"weights() returned a {name} that is not {len(trie)} finite numbers "
                f"{'up to 0' if name == 'minus' else 'from 0 up'}, with 0 at the root",
                "Return Credit.signed(weight) with one number per node of the trie",
            )
