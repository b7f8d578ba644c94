"""The reference page of the settings: `python -m twig.config.reference > docs/settings.md`."""

import sys
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from twig.config.load import Settings
from twig.config.messages import fields_of, group_of, write
from twig.core.algorithms.base import Algorithm
from twig.core.algorithms.registry import shipped


def settings_reference() -> str:
    """Returns `docs/settings.md`: every setting with its default, rule and description."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `python -m twig.config.reference > docs/settings.md` from the fields in "
        "src/twig/config/schema.py and src/twig/core/algorithms. -->",
        "",
        "A YAML file has these groups; `group.key=value` on the command line overrides it. An unknown key "
        "is refused.",
        "`twig train RECIPE_OR_FILE --dry-run` prints every setting of a run; its folder keeps them in "
        "`config.yaml`.",
        "`twig schema > twig.schema.json` writes the JSON schema for editors: with",
        "`# yaml-language-server: $schema=twig.schema.json` as a file's first line, VS Code's YAML extension",
        "completes and checks it.",
    ]
    for name, info in Settings.model_fields.items():
        group = Algorithm if name == "algorithm" else group_of(info)
        assert group is not None, "settings are groups"
        lines += ["", f"## {name}", "", " ".join((group.__doc__ or "").split()), "", *_HEAD]
        lines += [_row(key, field) for key, field in fields_of(group, f"{name}.")]
        if name == "algorithm":
            lines += ["", "Settings that only some algorithms have, or that have another default there:", ""]
            lines += ["| setting | default | may be | meaning | of |", "|---|---|---|---|---|", *_of_some()]
    return "\n".join(lines) + "\n"


_HEAD = ["| setting | default | may be | meaning |", "|---|---|---|---|"]


def _row(key: str, info: FieldInfo) -> str:
    default = "required" if info.is_required() else f"`{write(_default(info))}`"
    return f"| `{key}` | {default} | {rule_of(info)} | {info.description} |"


def _default(info: FieldInfo) -> Any:
    value = info.get_default(call_default_factory=True, validated_data={})
    return value.model_dump() if isinstance(value, BaseModel) else value


def _of_some() -> Iterable[str]:
    common = {_row(key, field) for key, field in fields_of(Algorithm, "algorithm.")}
    users: dict[str, list[str]] = {}
    for name, kind in shipped().items():
        for key, field in fields_of(kind, "algorithm."):
            row = _row(key, field)
            if row not in common and key != "algorithm.name":
                users.setdefault(row, []).append(f"`{name}`")
    return [f"{row} {', '.join(names)} |" for row, names in sorted(users.items())]


def rule_of(info: FieldInfo) -> str:
    """Returns what a setting may be, from its JSON schema, such as "number > 0"."""
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return _rule(TypeAdapter(kind).json_schema())


def _rule(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(_rule(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(write(value) for value in schema.get("enum", [schema.get("const")]))
    kind: str = schema.get("type", "any")
    if kind == "array":
        inner, size = _rule(schema["items"]), schema.get("minItems", 0)
        exact = size and size == schema.get("maxItems")
        return f"list of {f'{size} ' if exact else 'one or more ' if size else ''}({inner})"
    if kind == "boolean":
        return "true, false"
    names = {"integer": "whole number", "string": "text", "object": "mapping {name: value}"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([names.get(kind, kind), " and ".join(limits)]).strip()


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
