"""The credit of a step: an algorithm's weights on every group, divided and selected over all of them."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Generic, TypeVar

import numpy as np

from twig.common.errors import UserError
from twig.common.python_files import FileError
from twig.common.user_code import is_ours, message_from, traceback_from
from twig.core.algorithms.base import Algorithm, Credit, Items, Scale, Step
from twig.core.trie import PrefixTrie
from twig.core.types import Group

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """A group whose completions have rewards, merged into a trie, with the credit of its nodes.

    `slot` is its place among the groups of the step.
    """

    group: Group
    trie: PrefixTrie
    credit: Credit
    slot: int = 0


class Lazy(Generic[T]):
    """Items that are made when they are read, once."""

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self.length, self.make = length, cache(make)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> T:
        return self.make(index)

    def __iter__(self) -> Iterator[T]:
        return map(self.make, range(self.length))


class StepCredit:
    """The credit of a step with `num_prompts` prompts; that of a group is computed when it is asked for.

    `tries` and `rngs` have one entry per group in which a completion has a reward.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        tries: Items[PrefixTrie],
        rngs: Sequence[np.random.Generator],
        num_prompts: int,
    ) -> None:
        self.algorithm = algorithm
        weights = Lazy(len(tries), lambda index: _weights(algorithm, tries[index], rngs[index]))
        self.step = Step(tries, weights, num_prompts)

    @cached_property
    def scale(self) -> Scale:
        """What divides and selects. Raises UserError if it is no `Scale` that fits the step."""
        with _failing(self.algorithm):
            scale = self.algorithm.scale(self.step)
        if not isinstance(scale, Scale):
            problem = f"scale() returned a {type(scale).__name__}"
            raise _wrong(self.algorithm, problem, "Return twig.Scale(divisor)")
        if not (np.isfinite(scale.divisor) and scale.divisor > 0):
            raise _wrong(self.algorithm, f"its divisor is {scale.divisor}", "Return a finite number above 0")
        if scale.credits is not None and len(scale.credits) != len(self.step.tries):
            problem = f"scale() returned {len(scale.credits)} credits"
            raise _wrong(self.algorithm, problem, "Return one Credit per group")
        if scale.keep is not None:
            sizes = [np.shape(keep) for keep in scale.keep]
            if sizes != [(len(trie),) for trie in self.step.tries]:
                problem = f"scale() returned a keep of sizes {sizes}"
                raise _wrong(self.algorithm, problem, "Return one array of bool per group, over its nodes")
        return scale

    def of(self, index: int) -> Credit:
        """Returns the credit of a group; raises UserError if a weight is not one finite number per node."""
        trie, of_step = self.step.tries[index], self.scale.credits
        credit = (
            self.step.credits[index] if of_step is None else _checked(self.algorithm, trie, of_step[index])
        )
        return self.scale.apply(index, trie, credit)


def assign(
    algorithm: Algorithm, tries: Sequence[PrefixTrie], rngs: Sequence[np.random.Generator], num_prompts: int
) -> tuple[list[Credit], Scale]:
    """Returns the credit of each group of a step, and the scale that it was given; see `StepCredit`."""
    step = StepCredit(algorithm, tries, rngs, num_prompts)
    return [step.of(index) for index in range(len(tries))], step.scale


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
    except BaseException as error:
        if is_ours(error) or type(algorithm).__module__.startswith("twig."):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise FileError(
            f"algorithm {algorithm.name}",
            f"it raised at {frame.filename}:{frame.lineno}: {type(error).__name__}: {message_from(error)}",
            traceback_text=traceback_from(error),
        ) from error


def _wrong(algorithm: Algorithm, problem: str, fix: str) -> UserError:
    return UserError(f"algorithm {algorithm.name}", problem, fix)


def _weights(algorithm: Algorithm, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
    """Returns the algorithm's weights as arrays; raises UserError if they do not fit the trie."""
    with _failing(algorithm):
        credit = algorithm.weights(trie, rng)
    return _checked(algorithm, trie, credit)


def _checked(algorithm: Algorithm, trie: PrefixTrie, credit: Credit) -> Credit:
    """Returns a group's credit as arrays; raises UserError if it does not fit the trie."""
    with _failing(algorithm):
        kind = algorithm.objective().kind
    if not isinstance(credit, Credit):
        raise _wrong(algorithm, f"weights() returned a {type(credit).__name__}", "Return a twig.Credit")
    arrays = {}
    for name in ("plus", "minus", "kl"):
        arrays[name] = weight = np.asarray(getattr(credit, name))
        sign_is_right = (weight <= 0).all() if name == "minus" else (weight >= 0).all()
        fits = weight.shape == (len(trie),) and np.isfinite(weight).all() and weight[0] == 0
        if not (fits and sign_is_right):
            raise _wrong(
                algorithm,
                f"weights() returned a {name} that is not {len(trie)} finite numbers "
                f"{'up to 0' if name == 'minus' else 'from 0 up'}, with 0 at the root",
                "Return Credit.signed(weight) with one number per node of the trie",
            )
    tokens = credit.tokens and [np.asarray(each) for each in credit.tokens]
    lengths = [(len(path),) for path in trie.paths]
    if (tokens is None and kind == "sequence ratio") or (tokens and [t.shape for t in tokens] != lengths):
        raise _wrong(
            algorithm,
            f"the objective {kind!r} has no weight for each token of each completion",
            "Return what twig.core.algorithms.base.on_tokens returns, or set Credit.tokens",
        )
    return Credit(**arrays, tokens=tokens)
