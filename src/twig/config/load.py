"""Settings from a shipped recipe, a YAML file or a dict, with `group.key=value` overrides on top.

Every mistake becomes one line: where it was written, the dotted key, the value, the rule, what to write.
Knows the groups of `schema.py` and nothing about what acts on them.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self, Union

import yaml
from pydantic import (
    BaseModel,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from twig.common.errors import UserError, as_validator
from twig.common.frozen import Frozen
from twig.common.text import either, listed
from twig.config.messages import explain, fields_of, group_of, kind_of, nearest, takes_text, write
from twig.config.schema import Eval, Log, Lora, Memory, Model, Rollout, TaskSettings, Train
from twig.config.trl_names import hint
from twig.core.algorithms.base import Algorithm
from twig.core.algorithms.registry import DEFAULT, Unloaded, class_for, shipped

RUN_CONFIG, RUN_ENVIRONMENT = "config.yaml", "environment.json"
_ALIASED = 10_000  # values that the aliases of a text may add
logger = logging.getLogger(__name__)


@as_validator
def _algorithm(value: Any) -> Algorithm:
    """Builds the group `algorithm`: the class is the one that its `name` or `file` says."""
    if isinstance(value, Algorithm):
        return value
    return (class_for(value) if isinstance(value, dict) else Algorithm).model_validate(value)


class Settings(Frozen):
    """All settings of a run. `docs/settings.md` lists them."""

    model: Model
    lora: Lora = Field(default_factory=Lora)
    task: TaskSettings
    rollout: Rollout = Field(default_factory=Rollout)
    algorithm: Annotated[SerializeAsAny[Algorithm], PlainValidator(_algorithm)] = Field(
        default_factory=lambda: class_for({})()
    )
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    memory: Memory = Field(default_factory=Memory)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _fill_in_the_algorithm(self) -> Self:
        resolved = self.algorithm.resolved(self.rollout.max_completion_length)
        object.__setattr__(self, "algorithm", resolved)
        return self

    @model_validator(mode="after")
    @as_validator
    def _stopping_needs_evaluations(self) -> Self:
        key = self.train.stop_when.key
        if key is not None and not self.eval.steps:
            raise UserError(key, "nothing is evaluated during training", "Set eval.steps=20 too")
        return self

    @classmethod
    def from_dict(
        cls,
        values: dict[str, Any],
        overrides: Sequence[str] = (),
        label: str = "",
        shared: Sequence[str] = (),
    ) -> "Settings":
        """Returns the settings in a nested dict, with overrides on top; what is left out has its default.

        >>> values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
        >>> Settings.from_dict(values, ["train.max_steps=3"]).train.max_steps
        3

        An override of `algorithm.name` or `algorithm.file` drops the keys of the dict that the new algorithm
        does not have, and logs one line that says so. `shared` are overrides below the others, as if the dict
        had them (those of a whole study). `label` says where the dict comes from. Raises UserError, one line,
        for the first wrong value.
        """
        values, origins = _plain(values), {"": label}
        parsed = [(override, *parse_override(override)) for override in (*shared, *overrides)]
        for number, (override, key, value) in enumerate(parsed):
            if number == len(shared):
                _switch_algorithm(values, {each: chosen for _, each, chosen in parsed[number:]})
            origins[key] = f"override {_cut(override)}"
            _put(values, key, value, origins[key])
        if not overrides:
            _switch_algorithm(values, {})
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _with_origin(_explain(values, error), origins) from None
        except UserError as error:  # of a validator of the user's own
            raise _with_origin(error, origins) from None

    def with_overrides(self, overrides: Sequence[str]) -> "Settings":
        """Returns these settings with overrides such as "train.max_steps=100" on top."""
        return Settings.from_dict(self.model_dump(), overrides)

    def to_yaml(self) -> str:
        """Returns all settings as YAML text, defaults included; `load` reads it back to equal settings."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)

    def flat(self) -> dict[str, Any]:
        """Returns dotted key to value, of the groups in the order of the reference page."""
        return dict(_values(self, ""))


def _values(group: BaseModel | dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    extra = {}
    if isinstance(group, BaseModel):
        extra = group.model_extra or {}  # of an algorithm whose class is not loaded
        group = {name: getattr(group, name) for name in type(group).model_fields}
    for name, value in {**group, **extra}.items():
        if isinstance(value, BaseModel) or (isinstance(value, dict) and name in extra):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def affects(key: str) -> str:
    """Returns what the setting `key` affects, one of `schema.AFFECTS`.

    >>> affects("train.learning_rate"), affects("log.progress")
    ('results', 'display')
    """
    info = dict(fields_of(Settings)).get(key)
    extra = info.json_schema_extra if info else None
    return str(extra["affects"]) if isinstance(extra, dict) and "affects" in extra else "results"


@cache
def settings_with(kind: type[Algorithm]) -> type[Settings]:
    """Returns the type of settings whose algorithm is of one class: its fields are those that it may have."""
    return create_model("Settings", __base__=Settings, algorithm=(kind, Field(default_factory=kind)))


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a settings file, with every shipped algorithm, for editors."""
    kinds: Any = Union[(*shipped().values(), Unloaded)]
    schema = create_model("Settings", __base__=Settings, algorithm=(kinds, Field())).model_json_schema()
    schema["required"].remove("algorithm")
    schema["$defs"][Unloaded.__name__]["required"] = ["file"]  # or it would take any name
    return schema


# ---- reading ---------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Returns the names of the shipped recipes."""
    names = [entry.name for entry in _recipes().iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Returns the YAML text of a shipped recipe, comments included."""
    return (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")


def load(source: str, overrides: Sequence[str] = (), shared: Sequence[str] = ()) -> Settings:
    """Returns the settings of a recipe, a YAML file or a run folder, with overrides on top.

    `overrides` such as "train.max_steps=100" and `shared` as in `Settings.from_dict`. A shipped recipe's name
    wins over a file of that name. Raises UserError, one line, for anything wrong.
    """
    label, text = _read(source)
    values = parse_yaml(text, label)
    if not isinstance(values, dict | None):
        raise UserError(
            label,
            f"{kind_of(values)} is not a mapping of groups",
            "Write groups of settings, such as 'train:' with 'max_steps: 100' below it",
        )
    _refuse_part(values or {}, Path(label))
    return Settings.from_dict(values or {}, overrides, label, shared)


def _refuse_part(values: dict[str, Any], path: Path) -> None:
    """Raises UserError if the config.yaml of a run lacks a group: a run writes them all."""
    missing = [name for name in Settings.model_fields if name not in values]
    if missing and path.name == RUN_CONFIG and (path.parent / RUN_ENVIRONMENT).is_file():
        fix = f"Put the file back, or run twig train {path.parent} --resume, which may have its settings"
        raise UserError(str(path), f"damaged: it has no group {either(missing)}", fix)


def parse_override(text: str) -> tuple[str, Any]:
    """Returns the dotted key and the value in "group.key=value"; the value is read as YAML.

    A setting that takes nothing but text gets what was typed where YAML reads something else.

    >>> parse_override("train.learning_rate=1e-5")
    ('train.learning_rate', 1e-05)
    >>> parse_override("task.prompt_template=Problem: {question}")
    ('task.prompt_template', 'Problem: {question}')
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"override {_cut(text)}", "it is not group.key=value", "Write for example train.max_steps=100"
        )
    if "." not in key or not all(key.split(".")):
        elsewhere = hint(key)
        if elsewhere is not None:
            raise UserError(f"override {_cut(text)}", f"{key} is not a setting", elsewhere)
        group = _group(key)
        instead = f"{key}.{next(iter(group.model_fields))}" if group else nearest(Settings, key)
        raise UserError(
            f"override {_cut(text)}", f"{key} is not group.key", f"Write {instead or 'train.max_steps'}=VALUE"
        )
    read = parse_yaml(value, f"override {_cut(text)}")
    typed = read is not None and not isinstance(read, str) and takes_text(Settings, key)
    return key, value.strip() if typed else read


def parse_yaml(text: str, label: str) -> Any:
    """Returns the value of YAML text: `1e-5` is a number, only true and false are booleans, no key twice.

    Aliases may repeat values, but only as many as a person would write out: an alias inside its own anchor,
    or aliases of aliases without end, are refused.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _refuse_endless(node, label)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}, line {mark.line + 1}" if mark and "\n" in text.strip() else label
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        fix = "Remove one" if "twice" in problem else "Write text that holds : # { [ & * in quotes"
        raise UserError(where, f"not readable as YAML ({problem})", fix) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            label, f"not readable as YAML ({error})", "Write plain numbers and shallow groups"
        ) from None


def _refuse_endless(node: yaml.Node | None, label: str) -> None:
    """Raises UserError if the aliases of a YAML text stand for too many values, or for themselves."""
    sizes: dict[int, int | None] = {}  # of the nodes visited, by their identity; None while one is open

    def size(node: yaml.Node) -> int:
        """Returns how many values a node stands for, its own one included."""
        if id(node) not in sizes:
            sizes[id(node)] = None
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        total = sizes[id(node)]
        if total is None:
            raise UserError(label, "an alias stands for a value that it is part of", "Write the value out")
        return total

    if node is not None and size(node) - len(sizes) > _ALIASED:
        raise UserError(label, f"its aliases stand for over {_ALIASED:,} values", "Write the values out")


def _switch_algorithm(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Drops the keys of the group `algorithm` that belong to an algorithm other than the chosen one.

    So that `algorithm.name=grpo` is all that it takes to run a recipe with another algorithm. Keys that are
    written in an override stay, and are refused later. Older runs wrote the settings of all algorithms: keys
    at the default of another one are dropped without a word.
    """
    group = values.get("algorithm") if isinstance(values, dict) else None
    if not isinstance(group, dict):
        return
    keys = {key: overrides.get(f"algorithm.{key}") for key in ("name", "file")}
    choice = {key: value for key, value in keys.items() if value is not None}
    before = {key: group[key] for key in ("name", "file") if group.get(key) is not None} or {"name": DEFAULT}
    try:
        old, new = class_for(before), class_for(choice or before)
    except UserError:
        return  # it is refused when the group is built, with the place where it was written
    if choice.items() <= before.items():
        for key in [key for key in group if key not in new.model_fields and new is not Unloaded]:
            if _is_default_of_another(key, group[key]):
                del group[key]
        return
    defaults, dropped = old().model_dump(), []
    for key in list(group):
        if key in ("name", "file") or (key in defaults and group[key] == defaults[key]):
            del group[key]
        elif key not in new.model_fields:
            value = group.pop(key)
            if not _is_default_of_another(key, value):
                dropped.append(f"algorithm.{key}={write(value)}")
    if dropped:
        chosen = "=".join(f"algorithm.{key}={value}" for key, value in choice.items())
        logger.warning(f"{chosen}: dropped {listed(dropped)}, which it does not have")


def _is_default_of_another(key: str, value: Any) -> bool:
    defaults = [kind().model_dump()[key] for kind in shipped().values() if key in kind.model_fields]
    return bool(defaults) and (value is None or value in defaults)


def _put(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *groups, last = key.split(".")
    for depth, name in enumerate(groups):
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            above = ".".join(groups[: depth + 1])
            raise UserError(
                f"{origin}: {above}", "it is a value, not a group of settings", f"Set {above}=... itself"
            )
    values[last] = value


def _read(source: str) -> tuple[str, str]:
    names = recipe_names()
    if source in names:
        return f"recipe {source}", recipe_text(source)
    path = Path(source)
    fix = f"Name a recipe ({either(names)}), a YAML file or a run folder"
    try:
        if (path / RUN_CONFIG).is_file():
            path = path / RUN_CONFIG
        return str(path), path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(str(path), "not text in UTF-8", fix) from None
    except FileNotFoundError:
        near = difflib.get_close_matches(source, names, 1)
        raise UserError(
            source, "no such recipe or file", f"Did you mean {near[0]}?" if near else fix
        ) from None
    except IsADirectoryError:
        raise UserError(source, f"a folder without {RUN_CONFIG}", fix) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(source, f"it cannot be read ({reason})", fix) from None


def _recipes() -> Any:
    return files("twig") / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: no dates, no yes/no/on/off, no octal or base 60, and `1e-5` is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping of a node; raises YAMLError if a key is there twice."""
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
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _plain(value: Any) -> Any:
    # What Python callers pass naturally: tuples and paths.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- messages --------------------------------------------------------------------------------------------


def _explain(values: dict[str, Any], error: ValidationError) -> UserError:
    group = values.get("algorithm") if isinstance(values, dict) else None
    try:
        kind = class_for(group) if isinstance(group, dict) else class_for({})
    except UserError:
        kind = Algorithm
    for fault in error.errors():
        if fault["type"] == "extra_forbidden" and fault["loc"][0] == "algorithm" and len(fault["loc"]) == 2:
            key = str(fault["loc"][1])
            users = [name for name, each in shipped().items() if key in each.model_fields]
            if users:
                name = kind.model_fields["name"].default
                return UserError(
                    f"algorithm.{key}",
                    f"not a setting of algorithm.name={name}, only of {listed(users)}",
                    f"Leave it out, or set algorithm.name={users[0]}",
                )
    explained = explain(settings_with(kind), error.errors())
    known_elsewhere = hint(explained.key) if explained.problem.startswith("unknown setting") else None
    return UserError(explained.key, explained.problem, known_elsewhere or explained.fix)


def _with_origin(error: UserError, origins: dict[str, str]) -> UserError:
    origin = _origin(error.key, origins)
    return UserError(f"{origin}: {error.key}" if origin else error.key, error.problem, error.fix)


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
    return info and group_of(info)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def as_settings(given: Settings | dict[str, Any] | str) -> Settings:
    """Returns settings from themselves, a dict of groups, or the name of a recipe or file."""
    if isinstance(given, Settings):
        return given
    return load(given) if isinstance(given, str) else Settings.from_dict(given)
