"""The settings of the algorithms: which there are, what each is told, and what it does not have.

A group of its own file: `credit.py` needs no other.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from twig.records import UserError
from twig.task_settings import Frozen
from twig.wording import listed

S_GRPO_DEFAULTS = {"alpha": 50, "p": 0.3, "k": 100}
# Settings of the group `algorithm` that not every algorithm has, and those that have them.
_EVERY_TOKEN = ("grpo", "dr-grpo", "lambda-grpo", "tempo")
ALGORITHMS_WITH = {
    **dict.fromkeys([*S_GRPO_DEFAULTS, "unbiased"], ("s-grpo",)),
    **dict.fromkeys(["normalise", "l2", "replay"], ("t-spmo",)),
    "beta": ("s-grpo", *_EVERY_TOKEN),
    "scale_rewards": ("grpo", "s-grpo", "lambda-grpo", "tempo"),
    "divisor": ("dr-grpo",),
    "top_entropy_quantile": ("rloo", *_EVERY_TOKEN),
}


class Replay(Frozen):
    """Groups restarted from inside a completion. Used by `t-spmo` only."""

    probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Chance that a prompt's next group restarts from inside one of its completions.",
    )
    prefer_correct: float = Field(
        0.5, ge=0, le=1, description="Chance that a right completion is chosen for it."
    )
    cut: Literal["entropy", "uniform"] = Field(
        "entropy",
        description="Where the completion is cut: in proportion to the entropy recorded there, or anywhere.",
    )


class Algorithm(Frozen):
    """Which tokens get credit, and how much."""

    name: Literal["t-spmo", "grpo", "s-grpo", "dr-grpo", "rloo", "lambda-grpo", "tempo"] = Field(
        "t-spmo", description="The algorithm; see docs/algorithms.md."
    )
    scale_rewards: Literal["group", "none"] = Field(
        "group",
        description="`group` divides an advantage by the standard deviation of its group. Used by `grpo`, "
        "`s-grpo`, `lambda-grpo`, `tempo`; `dr-grpo` and `rloo` never divide.",
    )
    beta: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL term to the base model. Used by all but `t-spmo` and `rloo`.",
    )
    use_bias_correction_kl: bool = Field(
        True,
        description="Multiply the KL term by the probability ratio, as TRL does. Used where beta is above 0.",
    )
    epsilon: float = Field(
        0.2, ge=0, le=1, description="The ratio is clipped below at 1 - epsilon (`num_iterations` > 1)."
    )
    epsilon_high: float | None = Field(
        None,
        ge=0,
        description="The ratio is clipped above at 1 + epsilon_high. null: epsilon.",
        examples=[0.28],
    )
    num_iterations: int = Field(1, ge=1, description="Optimizer steps on each sampled batch.")
    mask_truncated_completions: bool = Field(
        False, description="Give no credit to completions that were cut off at max_completion_length."
    )
    alpha: int | None = Field(
        None,
        ge=0,
        description="The first alpha tokens are always trained. null: 50. Used by `s-grpo` only.",
        examples=[50],
    )
    p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Chance that a later token is trained. null: 0.3. Used by `s-grpo` only.",
        examples=[0.3],
    )
    k: int | None = Field(
        None,
        ge=1,
        description="Most tokens trained per completion. null: 100. Used by `s-grpo` only.",
        examples=[100],
    )
    unbiased: bool = Field(
        False,
        description="Draw the later tokens so that the expected gradient is that of `grpo`. Used by "
        "`s-grpo` only.",
    )
    divisor: int | None = Field(
        None,
        ge=1,
        description="What a completion's sum over its tokens is divided by in place of its length. null: "
        "rollout.max_completion_length. Used by `dr-grpo` only.",
        examples=[256],
    )
    top_entropy_quantile: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Only this share of a step's tokens, those sampled with the highest entropy, is pushed "
        "up or down. 1: all. Used by `grpo`, `dr-grpo`, `rloo`, `lambda-grpo`, `tempo`.",
        examples=[0.2],
    )
    normalise: Literal["unique", "branches"] = Field(
        "unique",
        description="Divide by all unique nodes of a group, or by those with credit only. Used by "
        "`t-spmo` only.",
    )
    l2: float = Field(
        0.0,
        ge=0,
        description="Lambda, the weight of the adapter's squared L2 norm (decoupled). Used by `t-spmo` only.",
    )
    replay: Replay = Field(default_factory=Replay, description="Groups restarted from inside a completion.")

    @model_validator(mode="after")
    def _one_algorithm(self) -> "Algorithm":
        if self.name == "s-grpo":
            for key, value in S_GRPO_DEFAULTS.items():
                _resolve(self, key, value)
            if self.unbiased and self.k <= self.alpha:
                raise UserError(
                    f"algorithm.k: {self.k} is not above algorithm.alpha={self.alpha}, "
                    "as algorithm.unbiased needs; "
                    f"write algorithm.k={self.alpha + 50} or a smaller algorithm.alpha"
                )
        unset = {**dict.fromkeys([*S_GRPO_DEFAULTS, "divisor"], "null"), "unbiased": "false"}
        unset |= {"normalise": "unique", "top_entropy_quantile": "1", "replay": "0"}
        unset |= {"l2": "0 (and algorithm.beta to stay near the base)"}
        unset |= {"beta": "0 (and algorithm.l2 to stay near the base)" if self.name == "t-spmo" else "0"}
        for key, instead in unset.items():
            self._refuse(key, instead)
        if self.name == "t-spmo":
            self._refuse("scale_rewards", "group")
        if self.name == "rloo" and self.num_iterations > 1:
            raise UserError(
                "algorithm.num_iterations: algorithm.name=rloo takes one step on a batch, as its ratio is "
                "that of the whole completion; write algorithm.num_iterations=1"
            )
        _resolve(self, "epsilon_high", self.epsilon)
        return self

    def _refuse(self, key: str, instead: str) -> None:
        """Raises UserError where `key`, which this algorithm does not have, is set."""
        value, users = getattr(self, key), ALGORITHMS_WITH[key]
        if key == "replay":
            key, value, default = "replay.probability", value.probability, 0.0
        else:
            default = type(self).model_fields[key].default
        if self.name not in users and value != default:
            raise UserError(
                f"algorithm.{key}: not used by algorithm.name={self.name}, only by {listed(users)}; "
                f"write algorithm.{key}={instead}"
            )


def _resolve(group: Frozen, key: str, value: Any) -> None:
    # The one write into a frozen group: null becomes what it stands for, while the group is being built.
    if getattr(group, key) is None:
        object.__setattr__(group, key, value)
