"""How much is computed at once: `Sizes`, and the settings that hold them.

A size changes memory and speed and, but for rounding, no result. Knows nothing about how sizes are chosen.
"""

from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from twig.config.load import Settings

# The settings that hold the sizes, in the order of the fields of `Sizes`.
SIZE_KEYS = (
    "rollout.wave_size",
    "train.pack_size",
    "train.head_chunk",
    "train.checkpoint_layers",
    "eval.batch_size",
    "rollout.packed_weights",
)


@dataclass(frozen=True)
class Sizes:
    """How much is computed at once: completions sampled, tokens of a pack, logits, and problems evaluated.

    `packed_weights` is whether sampling may copy the frozen matrices to be faster. The plan chooses all of
    them before a run, and a run takes smaller ones on out-of-memory.
    """

    wave_size: int
    pack_size: int
    head_chunk: int
    checkpoint_layers: bool
    eval_batch_size: int = 128
    packed_weights: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Sizes":
        """Returns the sizes in settings that leave none of them open."""
        flat = settings.flat()
        return cls(*(flat[key] for key in SIZE_KEYS))

    def by_key(self) -> dict[str, int | bool]:
        """Returns the sizes by their settings' keys."""
        return dict(zip(SIZE_KEYS, astuple(self), strict=True))


# Without a plan: the quickest ones that it would choose.
DEFAULT_SIZES = Sizes(128, 1024, 2**22, False, 128)


def with_free_sizes(settings: Settings, fixed: Collection[str] = ()) -> Settings:
    """Returns the settings with all sizes left to the plan, except the `fixed` keys."""
    return with_values(settings, {key: None for key in SIZE_KEYS if key not in fixed})


def open_sizes(settings: Settings) -> list[str]:
    """Returns the keys of the sizes that are left to the plan."""
    flat = settings.flat()
    return [key for key in SIZE_KEYS if flat[key] is None]


def with_sizes(settings: Settings, sizes: Mapping[str, Any]) -> Settings:
    """Returns the settings with those of `sizes`, by key, that they leave open."""
    return with_values(settings, {key: sizes[key] for key in open_sizes(settings)})


def as_begun(settings: Settings, before: Settings) -> Settings:
    """Returns the settings with what they leave to the machine as it was chosen when the run began."""
    if settings.model.kernels == "auto":
        settings = with_values(settings, {"model.kernels": before.model.kernels})
    return with_sizes(settings, before.flat())


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Returns the settings with other, unchecked values: None leaves a size to the plan."""
    for key, value in values.items():
        group, _, name = key.partition(".")
        changed = getattr(settings, group).model_copy(update={name: value})
        settings = settings.model_copy(update={group: changed})
    return settings
