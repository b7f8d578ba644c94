"""Reads a study from a YAML file: which runs are compared.

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
from twig.common.frozen import Frozen
from twig.common.text import listed
from twig.config.load import Settings, load, parse_override, parse_yaml
from twig.config.messages import explain, write
from twig.config.sizes import with_values

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
    target: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="The accuracy of which the tables say after how many tokens it was reached.",
    )
    seeds: list[Seed] = Field(
        default=[0, 1, 2, 3, 4], min_length=1, description="train.seed of the runs of a variant."
    )
    overrides: list[Text] = Field(
        default=[], description="Settings of all runs.", examples=[["eval.limit=500"]]
    )
    variants: dict[str, list[str]] = Field(
        default={},
        description="Overrides by the name of the variant.",
        examples=[{"grpo": ["algorithm.name=grpo"]}],
    )
    grid: dict[str, list[Any]] = Field(
        default={},
        description="Values by setting: every variant is run with each of them.",
        examples=[{"train.learning_rate": [0.001, 0.002]}],
    )


@dataclass(frozen=True)
class Variant:
    """What is compared: its name, and its settings except for the seed."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    variant: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{slug(self.variant)}-seed-{self.seed}"


def slug(name: str) -> str:
    """Returns `name` as a folder may be called.

    >>> slug("t-spmo, train.learning_rate=0.004")
    't-spmo-train.learning_rate-0.004'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "variant"


def load_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Reads the study in a YAML file, with overrides such as "max_tokens=1000" on top; raises UserError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            str(path), f"cannot be read ({reason})", "Pass the name of a study's YAML file"
        ) from None
    if not isinstance(values, dict):
        fix = "Write base:, max_tokens: and variants:, as docs/study.md shows"
        raise UserError(str(path), "not a mapping", fix)
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(override, "not key=value", "Write for example max_tokens=100000")
        # A key of the study is set there; a setting, which has a dot, is an override of all runs.
        if "." in key:
            values["overrides"] = [*values.get("overrides", []), override]
        else:
            values[key] = parse_yaml(value, override)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise _about(str(path), explain(Study, error.errors())) from None
    _refuse_without_effect(
        study, [override for override in overrides or [] if "." in override.partition("=")[0]]
    )
    return study


def _refuse_without_effect(study: Study, overrides: list[str]) -> None:
    """Raises UserError for an override that every variant or the grid sets again."""
    keys = [{override.partition("=")[0] for override in variant.overrides} for variant in variants_of(study)]
    for override in overrides:
        key = override.partition("=")[0]
        if all(key in own for own in keys):
            where = "the grid" if key in study.grid else "every variant"
            raise UserError(
                override, f"{where} of the study sets {key}", f"Change it there, or leave {key} out"
            )


def variants_of(study: Study) -> list[Variant]:
    """Returns every variant with every value of the grid, in the order of the file."""
    keys = list(study.grid)
    variants = []
    for name, own in (study.variants or {"": []}).items():
        for values in itertools.product(*study.grid.values()):
            grid = [f"{key}={write(value)}" for key, value in zip(keys, values, strict=True)]
            full_name = ", ".join([*([name] if name else []), *grid]) or "base"
            variants.append(Variant(full_name, (*own, *grid)))
    return variants


def runs_of(study: Study, folder: Path = Path()) -> list[Planned]:
    """Returns all runs, seed by seed, so that a study that is stopped half-way has some of each variant.

    A `base` that is a file is looked for beside the study's file, in `folder`. Raises UserError for the first
    override that is wrong, and for two variants that would share a folder.
    """
    beside = folder / study.base
    base = str(beside) if beside.exists() else study.base
    variants = variants_of(study)
    slugs = [slug(variant.name) for variant in variants]
    alike = [variant.name for variant in variants if slugs.count(slug(variant.name)) > 1]
    if alike:
        raise UserError("variants", f"the names {listed(alike[:2])} are too much alike", "Choose others")
    settings = [_settings_of(study, variant, base) for variant in variants]
    return [
        Planned(variant.name, seed, with_values(each, {"train.seed": seed}))
        for seed in dict.fromkeys(study.seeds)
        for variant, each in zip(variants, settings, strict=True)
    ]


def _settings_of(study: Study, variant: Variant, base: str) -> Settings:
    """Returns the settings of a variant's runs, but for their seed."""
    overrides = [*study.overrides, *variant.overrides]
    try:
        given = {parse_override(override)[0] for override in overrides}
        for key, instead in (("train.max_tokens", "max_tokens"), ("train.seed", "seeds")):
            if key in given:
                raise UserError(key, "the study itself sets it", f"Write {instead}: in the study")
        budget = ["train.max_steps=null", f"train.max_tokens={study.max_tokens}"]
        return load(base, variant.overrides, shared=[*budget, *study.overrides])
    except UserError as error:
        raise _about(f"variant {variant.name}", error) from None


def _about(where: str, error: UserError) -> UserError:
    return UserError(f"{where}: {error.key}", error.problem, error.fix)
