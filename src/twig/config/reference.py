"""The reference page of the settings: `python -m twig.config.reference > docs/settings.md`."""

import sys

from pydantic import BaseModel

from twig.config.load import Settings
from twig.config.messages import is_group, rule_of, write


def settings_reference() -> str:
    """`docs/settings.md`: every setting with its default, rule and description, made from the fields."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `python -m twig.config.reference > docs/settings.md` from the descriptions in "
        "src/twig/config/schema.py. -->",
        "",
        "A YAML file has these groups; `group.key=value` on the command line overrides it. An unknown key "
        "is refused.",
        "`twig train RECIPE_OR_FILE --dry-run` prints every setting of a run; its folder keeps them in "
        "`config.yaml`.",
        *_section(Settings, ""),
    ]
    return "\n".join(lines) + "\n"


def _section(group: type[BaseModel], prefix: str) -> list[str]:
    rows = [] if not prefix else ["", " ".join((group.__doc__ or "").split()), "", *_table(group, prefix)]
    for name, info in group.model_fields.items():
        if is_group(info.annotation):
            title = f"{prefix}.{name}" if prefix else name
            rows += ["", f"##{'#' if prefix else ''} {title}", *_section(info.annotation, title)]
    return rows


def _table(group: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| setting | default | may be | meaning |", "|---|---|---|---|"]
    for name, info in group.model_fields.items():
        if not is_group(info.annotation):
            default = "required" if info.is_required() else f"`{write(info.default)}`"
            rows.append(f"| `{prefix}.{name}` | {default} | {rule_of(info)} | {info.description} |")
    return rows


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
