"""Messages about settings: what a field may be, what is wrong with a value, which name was meant.

Works on any tree of pydantic groups, which is always the first argument. Knows nothing about which settings
there are, nor about where they were written.
"""

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twig.common.errors import UserError
from twig.common.text import either, parse_duration, parse_size

Root = type[BaseModel]


def fields_of(group: Root, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every setting below a group."""
    for name, info in group.model_fields.items():
        if is_group(info.annotation):
            yield from fields_of(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def is_group(kind: Any) -> bool:
    """Whether a field's type is a group of settings."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


# ---- what a field may be ---------------------------------------------------------------------------------


def rule_of(info: FieldInfo) -> str:
    """What a setting may be, in words, such as "a number above 0"."""
    return either(_alternatives(info.annotation, info.metadata))


def example_of(info: FieldInfo) -> str:
    """A value that the setting may have, as YAML."""
    if info.examples:
        return write(info.examples[0])
    if info.is_required():
        return write(get_args(info.annotation)[0]) if get_origin(info.annotation) is Literal else "..."
    return write(info.default)


def write(value: Any) -> str:
    """A value as a person writes it in YAML, on one line."""
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def kind_of(value: Any) -> str:
    """What a value is, in words: a mapping, a list, nothing, or the value itself."""
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), _show(value))


def _alternatives(kind: Any, limits: list[Any]) -> list[str]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _alternatives(arguments[0], limits + _limits(kind))
    if origin in (Union, types.UnionType):
        return [word for argument in arguments for word in _alternatives(argument, limits)]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin is list:
        return [_list_rule(arguments[0], limits)]
    if kind is str:
        return ["text that is not empty" if _bound(limits, "min_length") else "text"]
    if kind in (int, float):
        return [f"a {'whole ' if kind is int else ''}number{_range(limits)}"]
    if kind is bool:
        return ["true", "false"]
    return ["null" if kind is types.NoneType else "a mapping {name: value}"]


def _list_rule(item: Any, limits: list[Any]) -> str:
    inner = _limits(item)
    plain = get_args(item)[0] if get_origin(item) is Annotated else item
    plural = {int: "whole numbers", float: "numbers", str: "texts"}.get(plain)
    words = plural + _range(inner) if plural else f"values out of {', '.join(map(str, get_args(plain)))}"
    low, high = _bound(limits, "min_length"), _bound(limits, "max_length")
    if low and low == high:
        return f"a list of {low} {words}"
    return f"a list of {'one or more ' if low else ''}{words}"


def _range(limits: list[Any]) -> str:
    above, low, below, high = (_bound(limits, name) for name in ("gt", "ge", "lt", "le"))
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = f" above {above}" if above is not None else f" of at least {low}" if low is not None else ""
    words += f" and at most {high}" if words and high is not None else ""
    return words + (f" and below {below}" if below is not None else "")


def _limits(kind: Any) -> list[Any]:
    # pydantic keeps the limits of an Annotated type one level down, in the Field that sets them.
    if get_origin(kind) is not Annotated:
        return []
    return [limit for item in kind.__metadata__ for limit in getattr(item, "metadata", [item])]


def _bound(limits: list[Any], name: str) -> Any:
    return next((getattr(limit, name) for limit in limits if hasattr(limit, name)), None)


# ---- sizes and times -------------------------------------------------------------------------------------


def check_budget(value: str) -> str:
    """`value` if it is `auto` or a size; raises UserError."""
    if value != "auto" and parse_size(value) is None:
        raise UserError(
            f"memory.budget: {_show(value)} is not auto, a size or a share above 0 and up to 1; "
            "write for example memory.budget=6GiB"
        )
    return value


def check_duration(value: str) -> str:
    """`value` if it is a time above 0; raises UserError."""
    if parse_duration(value) is None:
        raise UserError(
            f"train.max_time: {_show(value)} is neither a time nor a number of seconds; write for example "
            "train.max_time=2h30m"
        )
    return value


# ---- what is wrong ---------------------------------------------------------------------------------------


def explain(root: Root, fault: Any) -> tuple[str, str]:
    """Dotted key of one of pydantic's faults, and what is wrong there and what to write instead."""
    if fault["type"] == "value_error":
        key, _, words = str(fault["ctx"]["error"]).partition(": ")
        return key, words
    group, path, info = _follow(root, fault["loc"])
    key = ".".join(path)
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return key, f"unknown setting; {_suggest(root, key, group)}"
    if info is None:
        return _explain_group(key, group, fault)
    if fault["type"] == "missing":
        return key, f"not set; write {key}={example_of(info)}"
    return key, _explain_value(key, info, fault["input"])


def nearest(root: Root, key: str) -> str | None:
    """The setting that was probably meant: that name elsewhere, a similar one here, or a similar one."""
    known = [name for name, _ in fields_of(root)]
    prefix, _, last = key.rpartition(".")
    same = [name for name in known if _last(name) == last]
    if same:
        return same[0]
    here = {_last(name): name for name in known if name.rpartition(".")[0] == prefix}
    anywhere = {_last(name): name for name in reversed(known)}
    for names, cutoff in ((here, 0.6), (anywhere, 0.75)):
        near = difflib.get_close_matches(last, names, 1, cutoff)
        if near:
            return names[near[0]]
    return None


def _follow(root: Root, location: tuple[Any, ...]) -> tuple[Root, list[str], FieldInfo | None]:
    # The innermost group of a location, its dotted path, and the field (None: the fault is the group itself).
    # A location goes on past the field, into list items and the alternatives of a union.
    group, path = root, []
    for part in map(str, location):
        path.append(part)
        info = group.model_fields.get(part)
        if info is None or not is_group(info.annotation):
            return group, path, info
        group = info.annotation
    return group, path, None


def _explain_group(key: str, group: Root, fault: Any) -> tuple[str, str]:
    name, info = next(iter(group.model_fields.items()))
    if not key:
        return (
            "settings",
            f"{kind_of(fault['input'])} is not a mapping of groups; write for example {name}: ...",
        )
    instead = f"{key}.{name}"
    if fault["type"] == "missing":
        return instead, f"not set; write {instead}={example_of(info)}"
    found = kind_of(fault["input"])
    return key, f"{found} is not a group of settings; write for example {instead}={example_of(info)}"


def _explain_value(key: str, info: FieldInfo, value: Any) -> str:
    # The example to write instead is the value itself, put right, where that can be guessed.
    rule, instead, kinds = rule_of(info), example_of(info), _kinds(info.annotation)
    choices = [item for kind in kinds if get_origin(kind) is Literal for item in get_args(kind)]
    items = [kind for kind in kinds if get_origin(kind) is list]
    if isinstance(value, str):
        near = difflib.get_close_matches(value, choices, 1)
        if near:
            return f"{_show(value)} is not {rule}; did you mean {near[0]}?"
        item_rules = [_kinds(get_args(kind)[0])[0] for kind in items]
        if any(value in get_args(kind) or kind is str and value for kind in item_rules):
            instead = f"[{value}]"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if str in kinds and float not in kinds:
            return f"{_show(value)} is a number, not text; write it in quotes, as {key}=\"'{value}'\""
        if int in kinds and isinstance(value, float) and value.is_integer() and value > 0:
            instead = str(int(value))
        elif items and isinstance(value, int) and value >= 0:
            instead = f"[{value}]" if "list of one or more" in rule else instead
    return f"{_show(value)} is not {rule}; write for example {key}={instead}"


def _kinds(kind: Any) -> list[Any]:
    # The alternatives of a type, without their limits.
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [item for argument in get_args(kind) for item in _kinds(argument)]
    return [kind]


def _suggest(root: Root, key: str, group: Root) -> str:
    if key in dict(fields_of(root)):
        name, _, last = key.rpartition(".")
        return f"write '{name}:' and below it, indented, '{last}: ...'"
    if group is root and "." not in key:
        near = difflib.get_close_matches(key, root.model_fields, 1, 0.7)
        if near:
            return f"did you mean {near[0]}?"
        if nearest(root, key) is None:
            return f"the groups are {', '.join(root.model_fields)}"
    near_key = nearest(root, key)
    if near_key:
        return f"did you mean {near_key}?"
    return f"{key.rpartition('.')[0]} has {', '.join(group.model_fields)}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _show(value: Any) -> str:
    text = write(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
