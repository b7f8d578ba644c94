"""Settings from a shipped recipe, a YAML file or a dict, with `group.key=value` overrides on top.

Every mistake becomes one line: where it was written, the dotted key, the value, the rule and what to write instead.
Knows the groups of `settings.py` and nothing about what acts on them. `python -m twig.config` writes the reference
page `docs/settings.md`.
"""

import difflib
import re
import sys
import types
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from twig.records import UserError
from twig.settings import Algorithm, Eval, Frozen, Log, Lora, Model, Rollout, TaskSettings, Train

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
    log: Log = Field(default_factory=Log)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origins: dict[str, str] | None = None) -> Self:
        """The settings in a nested dict; what is left out has its default.

        >>> settings = Settings.from_dict({"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}})
        >>> settings.train.learning_rate
        0.0001

        `origins` says where a dotted key was written ("" for the rest). Raises UserError for the first wrong value.
        """
        try:
            return cls.model_validate(_plain(values))
        except ValidationError as error:
            raise UserError(_one_line(error, origins or {})) from None

    def to_yaml(self) -> str:
        """All settings as YAML text, defaults included; `load` reads it back to equal settings."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=1000)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value, in the order of the reference page."""
        return {key: _look_up(self, key) for key, _ in fields_of(Settings)}


# ---- reading ------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _recipes().iterdir() if entry.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML text of a shipped recipe, comments included."""
    return (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")


def load(source: str, overrides: list[str] | None = None) -> Settings:
    """The settings of a recipe, a YAML file or a run folder, with overrides such as "train.learning_rate=1e-5" on top.

    A shipped recipe's name wins over a file of that name. Raises UserError, one line, for anything wrong.
    """
    label, text = _read(source)
    values = parse_yaml(text, label)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"{label}: holds {_kind(values)}; write groups of settings, such as 'train:' with 'max_steps: 100' below it"
        )
    origins = {"": label}
    for override in overrides or []:
        key, value = parse_override(override)
        _put(values, key, value, override)
        origins[key] = f"override {override}"
    return Settings.from_dict(values, origins)


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value in "group.key=value"; the value is read as YAML.

    >>> parse_override("train.learning_rate=1e-5")
    ('train.learning_rate', 1e-05)
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {text}: not group.key=value; write it as train.max_steps=100")
    if not all(key.split(".")) or "." not in key:
        near = _nearest(key)
        raise UserError(
            f"override {text}: {key!r} is not group.key; write it as {near or 'train.max_steps'}=..."
        )
    return key, parse_yaml(value, f"override {text}")


def parse_yaml(text: str, label: str) -> Any:
    """The value of YAML text by safe rules: `1e-5` is a number, only true and false are booleans, no key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label} line {mark.line + 1}" if mark and "\n" in text.strip() else label
        problem = getattr(error, "problem", None) or str(error)
        hint = (
            ""
            if "twice" in problem
            else "; write KEY: VALUE, with quotes around text that holds special characters"
        )
        raise UserError(f"{where}: not readable as YAML, {' '.join(problem.split())}{hint}") from None
    except RecursionError:
        raise UserError(
            f"{label}: nested too deeply to be settings; write groups with keys below them"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: no dates, no yes/no/on/off, no octal or base 60, and `1e-5` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key_node.value} is set twice; remove one of the two",
                        problem_mark=key_node.start_mark,
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _recipes() -> Any:
    return files("twig") / "recipes"


def _read(source: str) -> tuple[str, str]:
    if source in recipe_names():
        return f"recipe {source}", recipe_text(source)
    path = Path(source)
    if path.is_dir() and (path / RUN_CONFIG).is_file():
        path = path / RUN_CONFIG
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not a text file in UTF-8; name a recipe ({_or(recipe_names())}) or a YAML file"
        ) from None
    except FileNotFoundError:
        near = difflib.get_close_matches(source, recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"name a recipe ({_or(recipe_names())}) or a YAML file"
        raise UserError(f"{source}: no such recipe or file; {hint}") from None
    except IsADirectoryError:
        raise UserError(
            f"{source}: a folder without {RUN_CONFIG}; name a recipe, a YAML file or a run folder"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source}: cannot be read ({reason}); name a recipe or a YAML file") from None


def _put(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *groups, last = key.split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        if not isinstance(values[group], dict):
            raise UserError(
                f"override {override}: {group} holds {_kind(values[group])}, not settings; write a key that exists"
            )
        values = values[group]
    values[last] = value


def _plain(value: Any) -> Any:
    # What Python callers pass naturally: tuples and paths.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- words --------------------------------------------------------------------------------------------------------


def fields_of(group: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every setting below a group."""
    for name, info in group.model_fields.items():
        if _is_group(info.annotation):
            yield from fields_of(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def rule_of(info: FieldInfo) -> str:
    """What a setting may be, in words.

    >>> rule_of(dict(fields_of(Settings))["train.learning_rate"])
    'a number above 0'
    """
    return _rule(info.annotation, info.metadata)


def _rule(kind: Any, limits: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [limit for item in kind.__metadata__ for limit in getattr(item, "metadata", [item])]
        return _rule(arguments[0], [*limits, *inner])
    if origin in (Union, types.UnionType):
        return " or ".join(_rule(argument, limits) for argument in arguments)
    if origin is Literal:
        return _or([str(argument) for argument in arguments])
    if origin is list:
        item = _rule(arguments[0]).removeprefix("a ")
        bounds = {
            name: getattr(limit, name)
            for limit in limits
            for name in ("min_length", "max_length")
            if hasattr(limit, name)
        }
        if bounds and len(set(bounds.values())) == 1 and len(bounds) == 2:
            return f"a list of {bounds['min_length']} values, each a {item}"
        return f"a list [..., ...] of {item}" + (", not empty" if bounds else "")
    plain = {bool: "true or false", str: "text", dict: "a mapping {name: value}", types.NoneType: "null"}
    words = {int: "a whole number", float: "a number"}.get(kind)
    return plain.get(origin or kind, "") if words is None else words + _bounds(limits)


def _bounds(limits: list[Any] | tuple[Any, ...]) -> str:
    bound = {
        name: getattr(limit, name)
        for limit in limits
        for name in ("gt", "ge", "lt", "le")
        if hasattr(limit, name)
    }
    if "ge" in bound and "le" in bound:
        return f" from {bound['ge']} to {bound['le']}"
    low = f" above {bound['gt']}" if "gt" in bound else f" of at least {bound['ge']}" if "ge" in bound else ""
    return low + (f", below {bound['lt']}" if "lt" in bound else "")


def _one_line(error: ValidationError, origins: dict[str, str]) -> str:
    # An unknown key first: a value that is missing or wrong is often its consequence.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    lines: dict[str, str] = {}
    for fault in faults:
        key, words = _fault(fault)
        lines.setdefault(key, words)
    key, words = next(iter(lines.items()))
    origin = next((origins[part] for part in _ends(key) if part in origins), origins.get("", ""))
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"{origin}: {key}: {words}{more}" if origin else f"{key}: {words}{more}"


def _fault(fault: Any) -> tuple[str, str]:
    # Dotted key of a fault and what is wrong there. A location goes past the field, into list items and alternatives.
    if fault["type"] == "value_error":
        key, _, words = str(fault["ctx"]["error"]).partition(": ")
        return key, words
    group: type[BaseModel] = Settings
    path: list[str] = []
    for part in map(str, fault["loc"]):
        path.append(part)
        info = group.model_fields.get(part)
        if info is None or not _is_group(info.annotation):
            break
        group = info.annotation
    else:
        info = None
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return key, f"unknown setting; {_suggest(key, group, '.'.join(path[:-1]))}"
    if info is None:  # the fault is a whole group: left out, or something else than a mapping
        required = [f"{key}.{name}" for name, field in group.model_fields.items() if field.is_required()]
        instead = f"{key}.{next(iter(group.model_fields))}" if not required else required[0]
        wrong = (
            "not set"
            if fault["type"] == "missing"
            else f"holds {_kind(fault['input'])}, but is a group of settings"
        )
        if not path:
            return "settings", f"{wrong}; pass a dict of groups"
        return (
            instead if fault["type"] == "missing" else key
        ), f"{wrong}; write {instead}={_example(_field(instead))}"
    if fault["type"] == "missing":
        return key, f"not set; write {key}={_example(info)}"
    return key, _wrong_value(key, info, fault["input"])


def _wrong_value(key: str, info: FieldInfo, value: Any) -> str:
    rule = rule_of(info)
    choices = [
        str(item)
        for kind in (info.annotation, *get_args(info.annotation))
        if get_origin(kind) is Literal
        for item in get_args(kind)
    ]
    near = difflib.get_close_matches(str(value), choices, 1)
    if near:
        return f"{_show(value)} is not {rule}; did you mean {near[0]}?"
    if "text" in rule and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{_show(value)} is a number, not text; write it in quotes, as {key}=\"'{value}'\""
    return f"{_show(value)} is not {rule}; write for example {key}={_example(info)}"


def _suggest(key: str, group: type[BaseModel], prefix: str) -> str:
    near = _nearest(key)
    if near:
        return f"did you mean {near}?"
    return f"{prefix or 'the groups'} {'has' if prefix else 'are'} {', '.join(group.model_fields)}"


def _nearest(key: str) -> str | None:
    # The same name in another group, then a similar name in the same group, then a similar one anywhere.
    known = [name for name, _ in fields_of(Settings)]
    groups = list(Settings.model_fields)
    prefix, _, last = key.rpartition(".")
    for name in known:
        if name == key or name.rpartition(".")[2] == last:
            return name
    if not prefix and (near := difflib.get_close_matches(last, groups, 1, 0.7)):
        return near[0]
    here = [name for name in known if name.rpartition(".")[0] == prefix]
    near = difflib.get_close_matches(key, here, 1, 0.75) or difflib.get_close_matches(key, known, 1, 0.7)
    by_last = {name.rpartition(".")[2]: name for name in known}
    return (
        near[0]
        if near
        else next((by_last[n] for n in difflib.get_close_matches(last, by_last, 1, 0.75)), None)
    )


def _example(info: FieldInfo) -> str:
    default = info.examples[0] if info.examples else info.default
    if default is PydanticUndefined:
        default = get_args(info.annotation)[0] if get_origin(info.annotation) is Literal else "..."
    return _write(default)


def _write(value: Any) -> str:
    # A value as a person writes it in YAML, on one line.
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _show(value: Any) -> str:
    text = "null" if value is None else _write(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), _show(value))


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _ends(key: str) -> Iterator[str]:
    # The key, then the groups that hold it: an override of a group's key is the origin of a fault below it.
    while key:
        yield key
        key = key.rpartition(".")[0]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field(key: str) -> FieldInfo:
    return dict(fields_of(Settings))[key]


def _look_up(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = getattr(value, part)
    return value


# ---- the reference page -------------------------------------------------------------------------------------------


def settings_reference() -> str:
    """`docs/settings.md`: every setting with its default, rule and description, made from the fields."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `python -m twig.config > docs/settings.md`; change the descriptions in src/twig/settings.py. -->",
        "",
        "A YAML file has these groups; `group.key=value` on the command line overrides it. An unknown key is refused.",
        "`twig train RECIPE_OR_FILE --dry-run` prints every setting of a run; its folder keeps them in `config.yaml`.",
    ]
    for name, info in Settings.model_fields.items():
        group = info.annotation
        lines += ["", f"## {name}", "", *_paragraph(group), "", *_table(group, name)]
        for inner, field in group.model_fields.items():
            if _is_group(field.annotation):
                lines += ["", f"### {name}.{inner}", "", *_paragraph(field.annotation), ""]
                lines += _table(field.annotation, f"{name}.{inner}")
    return "\n".join(lines) + "\n"


def _paragraph(group: type[BaseModel]) -> list[str]:
    return [" ".join((group.__doc__ or "").split())]


def _table(group: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| setting | default | may be | meaning |", "|---|---|---|---|"]
    for name, info in group.model_fields.items():
        if not _is_group(info.annotation):
            default = "required" if info.is_required() else f"`{_write(info.default)}`"
            rows.append(f"| `{prefix}.{name}` | {default} | {rule_of(info)} | {info.description} |")
    return rows


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
