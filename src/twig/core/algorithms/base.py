"""What every algorithm shares: the protocol `Algorithm`, `Credit` on the nodes of a trie, and advantages.

An algorithm is one file in this folder: a subclass of `Algorithm` that holds its settings, its title and
citation, and up to three methods:

- `weights(trie, rng)`: unnormalised weights on the nodes of one group's trie;
- `scale(step)`: what divides the weights of the step, and which nodes keep theirs, from all of its groups
  (`step_divisor(step)` if it is one number);
- `objective()`: which of the objectives in `core.objective` the weights are put into.

Nothing outside this folder names an algorithm, and an algorithm in a file of the user's is used in the same
way.

Notation: R_i the reward of completion i, |o_i| its tokens, G the completions of the group, P the prompts of
the optimizer step, V(n) the mean reward of the completions through node n. Numpy only; knows nothing of
models.

Lee & Tong, "Token-Efficient RL for LLM Reasoning", arXiv 2504.20834, fixes the rules of S-GRPO and T-SPMO.
The options marked "ours" are not in the paper.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, get_args, runtime_checkable

import numpy as np
from pydantic import Field, field_validator, model_validator

from twig.common.errors import UserError, as_validator
from twig.common.frozen import Frozen
from twig.common.python_files import check_spec, split_spec
from twig.core.replay import Replay
from twig.core.trie import PrefixTrie, without_rounding

Kind = Literal["token ratio", "sequence ratio", "clipped weight"]
KINDS = get_args(Kind)
T_co = TypeVar("T_co", covariant=True)
PASSED = "<python>"  # stands in `algorithm.file` for a class that was passed from Python


@dataclass(frozen=True)
class Credit:
    """Weights on the nodes of one trie, one entry per node, 0 at the root.

    `plus` sums the positive weights that the completions add to a node and `minus` the negative ones: under
    clipping their sum alone is not enough. `kl` weighs the node's KL term. `tokens`, one array per
    completion, are the signed weights that it added to each of its tokens; only the objective "sequence
    ratio" needs them.
    """

    plus: np.ndarray
    minus: np.ndarray
    kl: np.ndarray
    tokens: Sequence[np.ndarray] | None = None

    @classmethod
    def signed(cls, weight: np.ndarray) -> Self:
        """Credit of one signed weight per node, without a KL term; the root's weight is set to 0.

        >>> Credit.signed(np.array([9.0, 0.5, -1.0])).minus.tolist()
        [0.0, 0.0, -1.0]
        """
        weight = np.append(0.0, weight[1:])
        return cls(weight.clip(min=0), weight.clip(max=0), np.zeros(len(weight)))

    @property
    def weighted(self) -> np.ndarray:
        """True at the nodes with a non-zero weight; only these are needed for the update."""
        return (self.plus != 0) | (self.minus != 0) | (self.kl != 0)


@runtime_checkable
class Items(Protocol[T_co]):
    """Things that are read by their number: a list, or made when they are read (`core.credit.Lazy`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...

    def __iter__(self) -> Iterator[T_co]: ...


@dataclass(frozen=True)
class Step:
    """All groups of an optimizer step, those of other processes included, with their unnormalised credit.

    `num_prompts` is P. `tries` and `credits` have one entry per group in which a completion has a reward.
    """

    tries: Items[PrefixTrie]
    credits: Items[Credit]
    num_prompts: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all trained completions, each as often as it was sampled."""
        return sum(int(trie.lengths[trie.trained].sum()) for trie in self.tries)

    @property
    def num_nodes(self) -> int:
        """Unique nodes of all groups, without the roots."""
        return sum(len(trie) - 1 for trie in self.tries)

    @property
    def num_weighted(self) -> int:
        """Nodes with a non-zero policy weight in all groups."""
        return sum(int(np.count_nonzero((c.plus != 0) | (c.minus != 0))) for c in self.credits)


@dataclass(frozen=True)
class Scale:
    """What `Algorithm.scale` returns: every weight of the step is divided by `divisor`.

    `keep` (None: all) has one array of bool per group over its nodes; if it is False the policy weight
    become 0. KL weights stay. `credits` (None: those of `weights`) has one `Credit` per group to divide in
    their place, for weights that depend on the other groups.
    """

    divisor: float
    keep: Sequence[np.ndarray] | None = None
    credits: Sequence[Credit] | None = None

    def apply(self, index: int, trie: PrefixTrie, credit: Credit) -> Credit:
        """Returns the credit of the group `index` of the step after division and selection."""
        keep = np.ones(len(trie), bool) if self.keep is None else self.keep[index]
        tokens = credit.tokens and [
            weight / self.divisor * keep[path] for weight, path in zip(credit.tokens, trie.paths, strict=True)
        ]
        plus, minus = credit.plus / self.divisor * keep, credit.minus / self.divisor * keep
        return Credit(plus, minus, credit.kl / self.divisor, tokens)


@dataclass(frozen=True)
class Objective:
    """Which objective of `core.objective` is minimised, and its settings.

    `epsilon`, `epsilon_high`: the clip range of the ratio, used only if old log-probs are given. `beta`:
    weight of the KL term; `bias_correction`: multiply it by the ratio (TRL's `use_bias_correction_kl`).
    """

    kind: Kind = "token ratio"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                "objective_kind",
                f"{self.kind!r} is no objective",
                f"Set it to {' or '.join(map(repr, KINDS))}",
            )


@dataclass(frozen=True)
class Load:
    """The most work that a group can ask of an update, for the memory plan.

    `paths`: completions run side by side. `tokens_per_path`: weighted tokens of each (None: all).
    `forks_only`: weights only at forks.
    """

    paths: int
    tokens_per_path: int | None = None
    forks_only: bool = False


class Algorithm(Frozen):
    """Which tokens get credit, and how much."""

    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one clause: what a token gets credit for
    citation: ClassVar[str | None] = None  # BibTeX of the paper, if it is another than `PAPER`
    in_credit_map: ClassVar[bool] = False  # whether reports draw it beside a run's own algorithm
    objective_kind: ClassVar[Kind] = "token ratio"
    # TRL's losses with this gradient: `loss_type` and `importance_sampling_level`
    trl_losses: ClassVar[tuple[tuple[str, str], ...]] = ()

    name: str = Field(default="", description="The algorithm; see docs/algorithms.md.")
    file: str | None = Field(
        default=None,
        description="Python file and the class of your own algorithm in it, in place of `name`; see "
        "docs/algorithms.md.",
        examples=["mine.py:MyRule"],
    )
    epsilon: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="The ratio is clipped below at 1 - epsilon (`num_iterations` > 1).",
    )
    epsilon_high: float | None = Field(
        default=None,
        ge=0,
        description="The ratio is clipped above at 1 + epsilon_high. null: epsilon.",
        examples=[0.28],
    )
    num_iterations: int = Field(default=1, ge=1, description="Optimizer steps on each sampled batch.")
    mask_truncated_completions: bool = Field(
        default=False, description="Give no credit to completions that were cut off at max_completion_length."
    )

    @field_validator("file")
    @classmethod
    @as_validator
    def _names_a_class(cls, value: str | None) -> str | None:
        if value is None or value == PASSED:
            return value
        if len(split_spec(check_spec(value, "algorithm.file"))[1]) > 1:
            raise UserError("algorithm.file", f"{value!r} names several classes", "Name one class")
        return value

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        # The only writes into a frozen group, while it is being built.
        if not self.name:
            in_file = self.file not in (None, PASSED)
            name = split_spec(self.file or "")[1][0] if in_file else type(self).__name__
            object.__setattr__(self, "name", name)
        if self.epsilon_high is None:
            object.__setattr__(self, "epsilon_high", self.epsilon)
        return self

    @classmethod
    def of_trl(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that the fields of TRL's `GRPOConfig` mean: those of the same name.

        Raises UserError, its key the field, if a value means nothing here.
        """
        return {name: value for name, value in values.items() if name in cls.model_fields}

    # ---- the protocol

    def weights(self, trie: PrefixTrie, rng: np.random.Generator) -> Credit:
        """Returns unnormalised weights on the nodes of one group's trie.

        A completion i with `trie.trained[i]` False counts in every mean and brings no weight of its own.
        `rng` is a function of seed, step and group.
        """
        raise NotImplementedError

    def scale(self, step: Step) -> Scale:
        """Returns what divides the weights of a step, and which nodes keep theirs (by default all)."""
        return Scale(self.step_divisor(step))

    def step_divisor(self, step: Step) -> float:
        """Returns the divisor of `scale` if nothing else enters it: by default the number of prompts."""
        return step.num_prompts

    def objective(self) -> Objective:
        """Returns the objective with this algorithm's settings."""
        assert self.epsilon_high is not None, "filled in when built"
        return Objective(self.objective_kind, self.epsilon, self.epsilon_high)

    # ---- what other parts of a run ask

    @property
    def l2_weight(self) -> float:
        """Lambda, the weight of the adapter's squared L2 norm (`core.objective.shrink`)."""
        return 0.0

    @property
    def restarts(self) -> Replay:
        """How groups restart from inside earlier completions."""
        return Replay()

    def resolved(self, max_completion_length: int) -> Self:
        """Returns the algorithm with settings that depend on the length limit filled in."""
        return self

    def load(self, num_generations: int, length: int) -> Load:
        """Returns the most work that a group of completions of `length` tokens can ask for."""
        return Load(num_generations)

    def describe(self) -> str:
        """Returns one clause that says which tokens are chosen, if that is a setting; else ""."""
        return ""


class KlTerm(Algorithm):
    """Settings of the KL term to the base model."""

    beta: float = Field(default=0.0, ge=0, description="Weight of the KL term to the base model.")
    use_bias_correction_kl: bool = Field(
        default=True,
        description="Multiply the KL term by the probability ratio, as TRL does. Used if beta is above 0.",
    )

    def objective(self) -> Objective:
        """Returns the objective with the KL term."""
        plain = super().objective()
        return Objective(
            plain.kind, plain.epsilon, plain.epsilon_high, self.beta, self.use_bias_correction_kl
        )


class ScaledRewards(Algorithm):
    """Advantages that are divided by a standard deviation of the rewards."""

    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Divide an advantage by the standard deviation of the rewards of its group, of the whole "
        "step (`batch`), or by nothing.",
    )

    def advantages(self, trie: PrefixTrie) -> np.ndarray:
        """Returns A_i of each completion; under `batch` the division is left to `scale`."""
        return advantages(trie.rewards, self.scale_rewards)

    def scale(self, step: Step) -> Scale:
        """Divides by the deviation of all rewards of the step too, if `scale_rewards` is `batch`."""
        scale = super().scale(step)
        if self.scale_rewards != "batch" or not step.tries:
            return scale
        rewards = np.concatenate([trie.rewards for trie in step.tries])
        return Scale(scale.divisor * reward_deviation(rewards), scale.keep)


class TopEntropy(Algorithm):
    """Selection of the tokens that were sampled with the highest entropy in the step.

    "Beyond the 80/20 Rule", arXiv 2506.01939; TRL's `top_entropy_quantile`.
    """

    top_entropy_quantile: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Only this share of a step's tokens, those sampled with the highest entropy, is pushed "
        "up or down. 1: all.",
        examples=[0.2],
    )

    def scale(self, step: Step) -> Scale:
        """Keeps the nodes of highest entropy: at least the quantile 1 - `top_entropy_quantile` of the step.

        A token counts as often as it was sampled, in trained completions.
        """
        scale = super().scale(step)
        if self.top_entropy_quantile == 1:
            return scale
        floor = entropy_at_quantile(step.tries, self.top_entropy_quantile)
        return Scale(scale.divisor, [trie.recorded_entropy >= floor for trie in step.tries])


# ---- the rules that they share -----------------------------------------------------------------------------


def advantages(rewards: np.ndarray, scale_rewards: str) -> np.ndarray:
    """Returns A_i = (R_i - mean) / (std + 1e-4), std with ddof 1.

    Only `scale_rewards="group"` divides here. Exactly 0 for a reward that differs from the mean by rounding.

    >>> advantages(np.array([0.1, 0.1, 0.1]), "group").tolist()
    [0.0, 0.0, 0.0]
    >>> advantages(np.array([1.0, 0.0]), "none").tolist()
    [0.5, -0.5]
    """
    same = without_rounding(np.append(rewards, rewards.mean()))
    centred = same[:-1] - same[-1]
    return centred / reward_deviation(rewards) if scale_rewards == "group" else centred


def reward_deviation(rewards: np.ndarray) -> float:
    """Returns the standard deviation (ddof 1) + 1e-4 that divides an advantage; 1 for a single reward."""
    return 1.0 if len(rewards) == 1 else float(rewards.std(ddof=1)) + 1e-4


def value_steps(trie: PrefixTrie) -> np.ndarray:
    """Returns V(n) - V(parent(n)) per node, 0 at the root: the step in mean reward that a token makes."""
    return np.append(0.0, trie.value[1:] - trie.value[trie.parent[1:]])


def segment_heads(trie: PrefixTrie) -> np.ndarray:
    """Returns, per node, the first node of its segment: the nodes between two forks, or ends, of completions.

    All nodes of a segment have the same completions; that of the root has all of them.

    >>> segment_heads(PrefixTrie.build([[1, 2, 3], [1, 2, 4, 5]], [1.0, 0.0])).tolist()
    [0, 0, 0, 3, 4, 4]
    """
    new = np.append(True, trie.count[1:] != trie.count[trie.parent[1:]])
    # NOTE: an only child that all completions reach comes right after its parent.
    return np.maximum.accumulate(np.where(new, np.arange(len(trie)), 0))


def on_tokens(
    trie: PrefixTrie,
    advantage: Sequence[float] | Sequence[np.ndarray] | np.ndarray,
    share: Sequence[float] | Sequence[np.ndarray],
    chosen: Sequence[np.ndarray] | None = None,
    kl: bool = False,
) -> Credit:
    """Returns the sums over completions of A_i * share_i / G at their chosen tokens (None: all).

    With `kl` share_i / G is the KL weight. A_i and share_i are one number for the whole completion, or one
    for each of its tokens. Completions that are not trained add nothing.
    """
    chosen = chosen or [np.ones(len(path), bool) for path in trie.paths]
    nodes = np.concatenate([path[keep] for path, keep in zip(trie.paths, chosen, strict=True)])

    def at_chosen(values: Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        return np.concatenate(
            [np.broadcast_to(v, keep.shape)[keep] for v, keep in zip(values, chosen, strict=True)]
        )

    shares = at_chosen(share) * at_chosen(trie.trained) / trie.num_completions
    signed = shares * at_chosen(advantage)

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(nodes, weights=weights, minlength=len(trie))

    tokens, first = [], 0
    for keep in chosen:
        tokens.append(np.zeros(len(keep)))
        tokens[-1][keep] = signed[first : first + int(keep.sum())]
        first += int(keep.sum())
    return Credit(total(signed.clip(min=0)), total(signed.clip(max=0)), total(shares) * kl, tokens)


def per_length(trie: PrefixTrie) -> list[float]:
    """Returns 1 / |o_i| of each completion (1 for an empty one)."""
    return [1 / max(len(path), 1) for path in trie.paths]


def entropy_at_quantile(tries: Items[PrefixTrie], top: float) -> float:
    """Returns the quantile 1 - `top` of the entropies of the trained tokens, linear between them.

    A token counts as often as it was sampled.
    """
    tokens = [
        trie.recorded_entropy[path]
        for trie in tries
        for path, train in zip(trie.paths, trie.trained, strict=True)
        if train
    ]
    joined = np.concatenate(tokens) if tokens else np.empty(0)
    return float(np.quantile(joined, 1 - top)) if len(joined) else np.inf


def arxiv_entry(key: str, title: str, author: str, number: str) -> str:
    """Returns a BibTeX entry; the year is that of the number's first two digits."""
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{author}}},\n  year = {{20{number[:2]}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
    )


PAPER = arxiv_entry(
    "lee2025tokenefficient", "Token-Efficient RL for LLM Reasoning", "Lee and Tong", "2504.20834"
)
