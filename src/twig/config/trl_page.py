"""The tables of docs/from-trl.md: `python -m twig.config.trl_page docs/from-trl.md` writes them into it."""

import sys
from pathlib import Path

from twig.config.from_trl import losses
from twig.config.load import settings_with
from twig.config.messages import fields_of, write
from twig.config.trl_names import INSTEAD, MAPPED, REFUSED, WITHOUT_MEANING
from twig.core.algorithms.registry import DEFAULT

FIELDS, LOSSES = "fields", "losses"


def with_tables(page: str) -> str:
    """Returns the page with its tables as the code says them."""
    for name, table in ((FIELDS, fields_table()), (LOSSES, losses_table())):
        begin, end = f"<!-- {name}: python -m twig.config.trl_page -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def fields_table() -> str:
    """Returns every field of `GRPOConfig` by what becomes of it."""
    own = _defaults()
    lines = ["| `GRPOConfig` | its default | here | its default | |", "|---|---|---|---|---|"]
    for name, (default, setting, remark) in MAPPED.items():
        ours = f"`{own[setting]}`" if setting in own else ""
        lines.append(f"| `{name}` | `{default!r}` | `{setting}` | {ours} | {remark} |")
    refused = [f"| `{name}` | `{default!r}` | {why} |" for name, (default, why) in REFUSED.items()]
    instead = [f"| `{name}` | `{default!r}` | {what} |" for name, (default, what) in INSTEAD.items()]
    rest = [f"| {', '.join(f'`{n}`' for n in names)} | {why} |" for why, names in WITHOUT_MEANING.items()]
    lines += ["", "Refused if they are not at their default:", ""]
    lines += ["| `GRPOConfig` | its default | because |", "|---|---|---|", *refused]
    lines += ["", "Without an equal; the run says what happens instead:", ""]
    lines += ["| `GRPOConfig` | its default | instead |", "|---|---|---|", *instead]
    lines += ["", "Without meaning here; the run names those that are set:", ""]
    lines += ["| `GRPOConfig` | because |", "|---|---|", *rest]
    return "\n".join(lines) + "\n"


def losses_table() -> str:
    """Returns TRL's losses that are here, with the algorithm that each is."""
    rows = [
        f"| `{loss}` | `{level}` | `{kind.model_fields['name'].default}` |"
        for (loss, level), kind in sorted(losses().items())
    ]
    head = ["| `loss_type` | `importance_sampling_level` | `algorithm.name` |", "|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _defaults() -> dict[str, str]:
    """Returns the default of each setting; of `algorithm`, that of the algorithm which TRL's default is."""
    kind = losses()[MAPPED["loss_type"][0], MAPPED["importance_sampling_level"][0]]
    values = {
        key: info.get_default(call_default_factory=True, validated_data={})
        for key, info in fields_of(settings_with(kind))
        if not info.is_required()
    }
    return {key: write(value) for key, value in (values | {"algorithm.name": DEFAULT}).items()}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
