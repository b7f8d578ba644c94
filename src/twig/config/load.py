"""Settings from a shipped recipe, a YAML file or a dict, with `group.key=value` overrides on top.

Every mistake becomes one line: where it was written, the dotted key, the value, the rule, what to write.
Knows the groups of `schema.py` and nothing about what acts on them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twig.common.errors import UserError
from twig.common.text import either
from twig.config.messages import explain, fields_of, kind_of, nearest
from twig.config.schema import (
    ALGORITHMS_WITH,
    Algorithm,
    Eval,
    Frozen,
    Log,
    Lora,
    Memory,
    Model,
    Rollout,
    TaskSettings,
    Train,
)

RUN_CONFIG = "config.yaml"


class Settings(Frozen):
    """All settings of a run. `docs/settings.md` lists them."""

    model: Model
    lora: Lora = Field(default_factory=Lora)
    task: TaskSettings
    rollout: Rollout = Field(default_factory=Rollout)
    algorithm: Algorithm = Field(default_factory=Algorithm)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    memory: Memory = Field(default_factory=Memory)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _dr_grpo_divides_by_the_longest_length(self) -> "Settings":
        if self.algorithm.name == "dr-grpo" and self.algorithm.divisor is None:
            options = self.algorithm.model_copy(update={"divisor": self.rollout.max_completion_length})
            object.__setattr__(self, "algorithm", options)
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: Sequence[str] = (), label: str = "") -> "Settings":
        """The settings in a nested dict, with overrides on top; what is left out has its default.

        >>> values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
        >>> Settings.from_dict(values, ["train.max_steps=3"]).train.max_steps
        3

        An override of `algorithm.name` drops what the dict says only for the algorithm that it names.

        `label` says where the dict comes from. Raises UserError, one line, for the first wrong value.
        """
        values, origins = _plain(values), {"": label}
        parsed = [parse_override(override) for override in overrides]
        _drop_settings_of_another_algorithm(values, dict(parsed).get("algorithm.name"))
        for override, (key, value) in zip(overrides, parsed, strict=True):
            origins[key] = f"override {_cut(override)}"
            _put(values, key, value, origins[key])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_one_line(error, origins)) from None

    def with_overrides(self, overrides: Sequence[str]) -> "Settings":
        """These settings with overrides such as "train.max_steps=100" on top."""
        return Settings.from_dict(self.model_dump(), overrides)

    def to_yaml(self) -> str:
        """All settings as YAML text, defaults included; `load` reads it back to equal settings."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value, in the order of the reference page."""
        return {key: _look_up(self, key) for key, _ in fields_of(Settings)}


# ---- reading ---------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    names = [entry.name for entry in _recipes().iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML text of a shipped recipe, comments included."""
    return (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")


def load(source: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a recipe, a YAML file or a run folder, with overrides ("train.max_steps=100") on top.

    A shipped recipe's name wins over a file of that name. Raises UserError, one line, for anything wrong.
    """
    label, text = _read(source)
    values = parse_yaml(text, label)
    if not isinstance(values, dict | None):
        raise UserError(
            f"{label}: {kind_of(values)} is not a mapping of groups; "
            "write groups of settings, such as 'train:' with 'max_steps: 100' below it"
        )
    return Settings.from_dict(values or {}, overrides, label)


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value in "group.key=value"; the value is read as YAML.

    >>> parse_override("train.learning_rate=1e-5")
    ('train.learning_rate', 1e-05)
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {_cut(text)}: not group.key=value; write for example train.max_steps=100")
    if "." not in key or not all(key.split(".")):
        instead = f"{key}.{next(iter(_group(key).model_fields))}" if _group(key) else nearest(Settings, key)
        raise UserError(
            f"override {_cut(text)}: {key} is not group.key; write {instead or 'train.max_steps'}=..."
        )
    return key, parse_yaml(value, f"override {_cut(text)}")


def parse_yaml(text: str, label: str) -> Any:
    """The value of YAML text: `1e-5` is a number, only true and false are booleans, no key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}, line {mark.line + 1}" if mark and "\n" in text.strip() else label
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        hint = "remove one" if "twice" in problem else "write text that holds : # { [ & * in quotes"
        raise UserError(f"{where}: not readable as YAML ({problem}); {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{label}: not readable as YAML ({error}); write plain numbers and shallow groups"
        ) from None


def _drop_settings_of_another_algorithm(values: dict[str, Any], name: Any) -> None:
    # So that `algorithm.name=grpo` is all that it takes to run a recipe with another algorithm.
    group = values.get("algorithm") if isinstance(values, dict) else None
    if name is not None and isinstance(group, dict) and group.get("name", name) != name:
        for key, names in ALGORITHMS_WITH.items():
            if name not in names:
                group.pop(key, None)


def _put(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *groups, last = key.split(".")
    for depth, name in enumerate(groups):
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            above = ".".join(groups[: depth + 1])
            raise UserError(
                f"{origin}: {above} is a value, not a group of settings; write {above}=... itself"
            )
    values[last] = value


def _read(source: str) -> tuple[str, str]:
    names = recipe_names()
    if source in names:
        return f"recipe {source}", recipe_text(source)
    path = Path(source)
    instead = f"name a recipe ({either(names)}), a YAML file or a run folder"
    try:
        if (path / RUN_CONFIG).is_file():
            path = path / RUN_CONFIG
        return str(path), path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; {instead}") from None
    except FileNotFoundError:
        near = difflib.get_close_matches(source, names, 1)
        raise UserError(
            f"{source}: no such recipe or file; {f'did you mean {near[0]}?' if near else instead}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{source}: a folder without {RUN_CONFIG}; {instead}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot be read ({reason}); {instead}") from None


def _recipes() -> Any:
    return files("twig") / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: no dates, no yes/no/on/off, no octal or base 60, and `1e-5` is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; raises YAMLError where a key is there twice."""
        seen = set()
        for key, _ in node.value:
            if key.value == "<<" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would take for something else, and never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: a list that is there twice is written twice."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line ends that are read back as plain ones, unless they are written as escapes.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_PLAIN_VALUES = [
    ("bool", r"true|false|True|False|TRUE|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+.0123456789"]),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
]
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN_VALUES:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _plain(value: Any) -> Any:
    # What Python callers pass naturally: tuples and paths.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- words -----------------------------------------------------------------------------------------------


def _one_line(error: ValidationError, origins: dict[str, str]) -> str:
    # An unknown key comes first: a value that is missing or wrong is often its consequence.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] not in ("extra_forbidden", "invalid_key"))
    words_of: dict[str, str] = {}
    for fault in faults:
        key, words = explain(Settings, fault)
        words_of.setdefault(key, words)
    key, words = next(iter(words_of.items()))
    origin = _origin(key, origins)
    more = f" (and {len(words_of) - 1} more)" if len(words_of) > 1 else ""
    return f"{origin}: {key}: {words}{more}" if origin else f"{key}: {words}{more}"


def _origin(key: str, origins: dict[str, str]) -> str:
    # The override of this key, else one above it, else one below it, else the file.
    for name in _ends(key):
        if name in origins:
            return origins[name]
    below = [origin for name, origin in origins.items() if name.startswith(f"{key}.")]
    return below[-1] if below else origins.get("", "")


def _ends(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _group(name: str) -> type[BaseModel] | None:
    info = Settings.model_fields.get(name)
    return info.annotation if info else None


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _look_up(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = getattr(value, part)
    return value


def as_settings(given: Settings | dict[str, Any] | str) -> Settings:
    """Settings from themselves, a dict of groups, or the name of a recipe or file."""
    if isinstance(given, Settings):
        return given
    return load(given) if isinstance(given, str) else Settings.from_dict(given)
