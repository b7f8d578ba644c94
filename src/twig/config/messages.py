"""Says what is wrong with a setting: pydantic's message, the dotted key, and what to write instead.

Works on any tree of pydantic groups, which is always the first argument. Knows nothing about which settings
there are, nor about where they were written.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twig.common.errors import Invalid, UserError, as_validator
from twig.common.text import parse_duration, parse_size

Root = type[BaseModel]


def fields_of(group: Root, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields dotted key and field of every setting below a group."""
    for name, info in group.model_fields.items():
        inner = group_of(info)
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def group_of(info: FieldInfo) -> Root | None:
    """Returns the group of settings that a field holds, None if it holds a value."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def example_of(info: FieldInfo) -> str:
    """Returns a value that the setting may have, as YAML."""
    if info.examples:
        return write(info.examples[0])
    if info.is_required():
        return write(get_args(info.annotation)[0]) if get_origin(info.annotation) is Literal else "..."
    return write(info.default)


def write(value: Any) -> str:
    """Returns a value as a person writes it in YAML, on one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if "\n" in value else value
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def kind_of(value: Any) -> str:
    """Returns what a value is: a mapping, a list, nothing, or the value itself."""
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), _show(value))


# ---- sizes and times -------------------------------------------------------------------------------------


@as_validator
def check_budget(value: str) -> str:
    """Returns `value` if it is `auto` or a size; raises Invalid."""
    if value != "auto" and parse_size(value) is None:
        raise UserError(
            "memory.budget",
            f"{_show(value)} is not auto, a size or a share above 0 and up to 1",
            "Set for example memory.budget=6GiB",
        )
    return value


@as_validator
def check_duration(value: str) -> str:
    """Returns `value` if it is a time above 0; raises Invalid."""
    if parse_duration(value) is None:
        raise UserError(
            "train.max_time",
            f"{_show(value)} is neither a time nor a number of seconds",
            "Set for example train.max_time=2h30m",
        )
    return value


# ---- what is wrong ---------------------------------------------------------------------------------------


def explain(root: Root, faults: Sequence[Any]) -> UserError:
    """Returns the error for the first setting that is wrong, from pydantic's faults of a whole validation."""
    # An unknown key comes first: a value that is missing or wrong is often its consequence.
    ordered = sorted(faults, key=lambda fault: fault["type"] not in ("extra_forbidden", "invalid_key"))
    first = _explain(root, ordered[0], faults)
    keys = {_explain(root, fault, faults).key for fault in faults}
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return UserError(first.key, first.problem + more, first.fix)


def _explain(root: Root, fault: Any, faults: Sequence[Any]) -> UserError:
    if fault["type"] == "value_error" and isinstance(fault["ctx"]["error"], Invalid):
        return fault["ctx"]["error"].error
    group, path, info = _follow(root, fault["loc"])
    key = ".".join(path)
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return UserError(key, "unknown setting", _suggest(root, key, group))
    if info is None:
        return _explain_group(key, group, fault)
    if fault["type"] == "missing":
        return UserError(key, "not set", f"Set {key}={example_of(info)}")
    # One message for each alternative of a union.
    same = [each["msg"] for each in faults if ".".join(_follow(root, each["loc"])[1]) == key]
    rules = dict.fromkeys(message.partition(" should ")[2] or message for message in same)
    return UserError(
        key, f"{_show(fault['input'])} should {' or '.join(rules)}", _instead(key, info, fault["input"])
    )


def nearest(root: Root, key: str) -> str | None:
    """Returns the setting that was probably meant, None if none is similar."""
    keys = [name for name, _ in fields_of(root)]
    prefix, _, last = key.rpartition(".")
    same = [name for name in keys if _last(name) == last]
    if same:
        return same[0]
    here = {_last(name): name for name in keys if name.rpartition(".")[0] == prefix}
    anywhere = {_last(name): name for name in reversed(keys)}
    for names, cutoff in ((here, 0.6), (anywhere, 0.75)):
        near = difflib.get_close_matches(last, names, 1, cutoff)
        if near:
            return names[near[0]]
    return None


def _follow(root: Root, location: tuple[Any, ...]) -> tuple[Root, list[str], FieldInfo | None]:
    # The innermost group of a location, its dotted path, and the field (None: the fault is the group itself).
    # A location continues past the field, into list items and the alternatives of a union.
    group, path = root, []
    for part in map(str, location):
        path.append(part)
        info = group.model_fields.get(part)
        inner = info and group_of(info)
        if info is None or inner is None:
            return group, path, info
        group = inner
    return group, path, None


def _explain_group(key: str, group: Root, fault: Any) -> UserError:
    name, info = next(iter(group.model_fields.items()))
    given = kind_of(fault["input"])
    if not key:
        return UserError("settings", f"{given} is not a mapping of groups", f"Write for example {name}: ...")
    instead = f"{key}.{name}"
    if fault["type"] == "missing":
        return UserError(instead, "not set", f"Set {instead}={example_of(info)}")
    return UserError(
        key, f"{given} is not a group of settings", f"Set for example {instead}={example_of(info)}"
    )


def _instead(key: str, info: FieldInfo, value: Any) -> str:
    # The example to write instead is the value itself, put right, if that can be guessed.
    kinds = _kinds(info.annotation)
    items = [_kinds(get_args(kind)[0])[0] for kind in kinds if get_origin(kind) is list]
    choices = [item for kind in [*kinds, *items] if get_origin(kind) is Literal for item in get_args(kind)]
    example = example_of(info)
    if isinstance(value, str):
        near = difflib.get_close_matches(value, map(str, choices), 1)
        if near:
            return f"Did you mean {key}={near[0]}?"
        if value and str in items:
            example = f"[{value}]"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if str in kinds and float not in kinds:
            return f"Write it in quotes: {key}=\"'{value}'\""
        if int in kinds and isinstance(value, float) and value.is_integer() and value > 0:
            example = str(int(value))
        elif int in items and isinstance(value, int) and value >= 0 and not isinstance(info.default, list):
            example = f"[{value}]"
    # a shell would take double quotes away
    return f"Set for example '{key}={example}'" if example[0] == '"' else f"Set for example {key}={example}"


def _kinds(kind: Any) -> list[Any]:
    # The alternatives of a type, without their limits.
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_args(kind) and get_origin(kind) not in (list, dict, Literal):
        return [item for argument in get_args(kind) for item in _kinds(argument)]
    return [kind]


def takes_text(root: Root, key: str) -> bool:
    """Tells whether a setting takes text, and nothing else but None."""
    info = dict(fields_of(root)).get(key)
    return info is not None and {str} == {*_kinds(info.annotation)} - {type(None)}


def _suggest(root: Root, key: str, group: Root) -> str:
    if key in dict(fields_of(root)):
        name, _, last = key.rpartition(".")
        return f"Write '{name}:' and below it, indented, '{last}: ...'"
    if group is root and "." not in key:
        near = difflib.get_close_matches(key, root.model_fields, 1, 0.7)
        if near:
            return f"Did you mean {near[0]}?"
        if nearest(root, key) is None:
            return f"Write one of the groups {', '.join(root.model_fields)}"
    near_key = nearest(root, key)
    if near_key:
        return f"Did you mean {near_key}?"
    return f"Write one of {', '.join(group.model_fields)} below {key.rpartition('.')[0]}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _show(value: Any) -> str:
    text = write(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
