"""A study: which runs are compared, read from a YAML file.

Variants (lists of overrides by name) times the values of a grid times seeds, all from one recipe. Knows
nothing of how runs are made or read.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from twig.common.errors import UserError
from twig.common.text import either
from twig.config.load import Settings, load, parse_override, parse_yaml
from twig.config.messages import explain, write
from twig.config.schema import Frozen

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]


class Study(Frozen):
    """What a study's file says."""

    base: Text = Field(description="The recipe or file that every run starts from.", examples=["quickstart"])
    max_tokens: int = Field(
        ge=1,
        description="Tokens that every run samples: the budget. It replaces train.max_steps.",
        examples=[500000],
    )
    seeds: list[Seed] = Field(
        [0, 1, 2, 3, 4], min_length=1, description="train.seed of the runs of a variant."
    )
    overrides: list[Text] = Field([], description="Settings of all runs.", examples=[["eval.limit=500"]])
    variants: dict[str, list[str]] = Field(
        {}, description="Overrides by the name of the variant.", examples=[{"grpo": ["algorithm.name=grpo"]}]
    )
    grid: dict[str, list[Any]] = Field(
        {},
        description="Values by setting: every variant is run with each of them.",
        examples=[{"train.learning_rate": [0.001, 0.002]}],
    )


@dataclass(frozen=True)
class Variant:
    """What is compared: its name, and its settings but for the seed."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """One run of a study: its variant, seed and settings; `name` is its folder's."""

    variant: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        return f"{slug(self.variant)}-seed-{self.seed}"


def slug(name: str) -> str:
    """A name that a folder can have.

    >>> slug("t-spmo, train.learning_rate=0.004")
    't-spmo-train.learning_rate-0.004'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "variant"


def load_study(path: Path, words: list[str] | None = None) -> Study:
    """The study in a YAML file, with overrides such as "max_tokens=1000" on top; raises UserError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); write the name of a study's YAML file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: no mapping; write base:, max_tokens: and variants:, as docs/study.md shows")
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word}: not key=value; write for example max_tokens=100000")
        # What is of the study is set there; a setting, which has a dot, is an override of all runs.
        if "." in key:
            values["overrides"] = [*values.get("overrides", []), word]
        else:
            values[key] = parse_yaml(value, word)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        key, what = explain(Study, error.errors()[0])
        raise UserError(f"{path}: {key}: {what}") from None


def variants_of(study: Study) -> list[Variant]:
    """Every variant with every value of the grid, in the order of the file."""
    keys = list(study.grid)
    found = []
    for name, own in (study.variants or {"": []}).items():
        for values in itertools.product(*study.grid.values()):
            words = [f"{key}={write(value)}" for key, value in zip(keys, values, strict=True)]
            found.append(Variant(", ".join([*([name] if name else []), *words]) or "base", (*own, *words)))
    return found


def runs_of(study: Study, folder: Path = Path()) -> list[Planned]:
    """All runs, seed by seed, so that a study that is broken off has some of each variant.

    A `base` that is a file is looked for beside the study's file, in `folder`. Raises UserError for the first
    override that is wrong, and for two variants that would share a folder.
    """
    beside = folder / study.base
    base = str(beside) if beside.exists() else study.base
    variants = variants_of(study)
    names = [slug(variant.name) for variant in variants]
    twice = [v.name for v, name in zip(variants, names, strict=True) if names.count(name) > 1]
    if twice:
        raise UserError(f"variants: {either(twice[:2])}: their names are too much alike; write others")
    found = []
    for seed, variant in itertools.product(dict.fromkeys(study.seeds), variants):
        budget = ["train.max_steps=null", f"train.max_tokens={study.max_tokens}"]
        words = [*budget, *study.overrides, *variant.overrides, f"train.seed={seed}"]
        taken = {parse_override(word)[0] for word in (*study.overrides, *variant.overrides)}
        for key, instead in (("train.max_tokens", "max_tokens"), ("train.seed", "seeds")):
            if key in taken:
                raise UserError(f"variant {variant.name}: {key} is the study's own; write {instead}:")
        try:
            settings = load(base, words)
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from None
        found.append(Planned(variant.name, seed, settings))
    return found
