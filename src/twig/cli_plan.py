"""The command `twig plan`: what a run needs of memory, item by item, or what fits devices of given sizes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from twig.cli_shared import Overrides, result_console
from twig.config import Settings, load
from twig.machine import device_kind, free_memory
from twig.memory import PROMPT_TOKENS, Plan, budget_bytes, plan, with_free_sizes
from twig.records import UserError
from twig.shape import find_file, read_config
from twig.tasks import load_task, render_prompt
from twig.wording import format_size, parse_size

_DEVICES = {"cpu": "a CPU", "cuda": "a CUDA GPU", "mps": "an Apple GPU"}
_PROBLEMS = 2000  # whose prompts are counted
_CHAT_TOKENS = 64  # at most, that a chat template puts around a prompt
_LETTERS = 2.5  # a token has more in nearly every text


def plan_command(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe, a YAML file or a run folder.")
    ],
    overrides: Overrides = None,
    sizes: Annotated[
        str | None,
        typer.Option("--for", metavar="SIZES", help="Devices, such as 4GiB,8GiB. Without it: this machine."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of the longest prompt. Without it: counted."),
    ] = None,
) -> None:
    """Show how much memory a run needs, and what to change where it does not fit."""
    settings = load(source, overrides or ())
    config = read_config(settings.model.name, settings.model.revision)
    known = prompt_tokens or longest_prompt(settings)
    options: dict[str, Any] = {"prompt_tokens": known or PROMPT_TOKENS}
    wanted = settings.model.device
    kind = "cuda" if sizes is not None and wanted == "auto" else device_kind(wanted)
    length = f"prompts of up to {options['prompt_tokens']} tokens{'' if known else ' (assumed)'}"
    lines = [f"{settings.model.name} on {_DEVICES.get(kind, kind)}, {length}"]
    console = result_console()
    if sizes is None:
        found = plan(
            config, settings, budget_bytes(settings.memory.budget, free_memory(kind)), kind, **options
        )
        table, plans = phases_table(found), {"this machine": found}
    else:
        free = with_free_sizes(settings, {word.partition("=")[0] for word in overrides or ()})
        plans = {name: plan(config, free, size, kind, **options) for name, size in _sizes(sizes).items()}
        table, found = sizes_table(plans), next(iter(plans.values()))
    console.print(Text("\n".join([*lines, *found.notes, ""])), soft_wrap=True)
    console.print(table)
    for name, each in plans.items():
        console.print(Text("\n" + verdict(name, each)), soft_wrap=True)


def _sizes(text: str) -> dict[str, int]:
    found = {word.strip(): parse_size(word) for word in text.split(",")}
    for word, size in found.items():
        if size is None:
            raise UserError(f"--for: {word!r} is not a size; write for example --for 4GiB,8GiB")
    return {word: size for word, size in found.items() if size is not None}


def phases_table(found: Plan) -> Table:
    """What each phase holds at its peak: a row for each item, the largest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("at the peak of")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    columns = [{item.name: item.size for item in phase.items} for phase in found.phases]
    names = {name: max(column.get(name, 0) for column in columns) for column in columns for name in column}
    for name in sorted(names, key=lambda name: -names[name]):
        table.add_row(name, *(format_size(column[name]) if name in column else "" for column in columns))
    table.add_row("together", *(format_size(phase.peak) for phase in found.phases), style="bold")
    return table


def sizes_table(plans: dict[str, Plan]) -> Table:
    """What fits where: the peak of each phase, and what was chosen: completions sampled at once, tokens of a
    pack, logits of a head chunk, and whether layers run twice."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("peak, GiB")
    phases = [phase.name for phase in next(iter(plans.values())).phases]
    for name in (*phases, "fits", "wave", "pack", "chunk", "twice"):
        table.add_column(name, justify="right")
    for name, found in plans.items():
        peaks = (f"{phase.peak / 2**30:.2f}" for phase in found.phases)
        chosen = map(str, (found.wave_size, found.pack_size, f"{found.head_chunk // 1024}k"))
        words = ("yes" if yes else "no" for yes in (found.fits, found.checkpoint_layers))
        table.add_row(Text(name), *peaks, next(words), *chosen, *words)
    return table


def verdict(name: str, found: Plan) -> str:
    """Whether it fits and with what settings, or what to change."""
    have = f"{format_size(found.budget)}, a twentieth of which is left free"
    need = format_size(found.peak)
    if found.fits:
        chosen = {
            "rollout.wave_size": found.wave_size,
            "train.pack_size": found.pack_size,
            "train.head_chunk": found.head_chunk,
            "train.checkpoint_layers": str(found.checkpoint_layers).lower(),
            "eval.batch_size": found.eval_batch_size,
        }
        words = " ".join(f"{key}={value}" for key, value in chosen.items())
        return f"{name}: fits, {need} of {have}, with\n  {words}"
    lines = [
        f"{name}: does not fit, {need} of {have}. Change, the cheapest first, each with those before it:"
    ]
    lines += [
        f"  {advice.changes:<44} {format_size(advice.peak)}{', fits' if advice.fits else ''}"
        for advice in found.advice
    ]
    if not found.advice or not found.advice[-1].fits:
        lines.append("  and a smaller model")
    return "\n".join(lines)


# ---- how long prompts are --------------------------------------------------------------------------------


def longest_prompt(settings: Settings) -> int | None:
    """Tokens of the task's longest prompt, rather too many than too few; None where its data is not at hand.

    With the model's tokenizer where that is at hand too, else from the number of letters.
    """
    if settings.task.name != "multiplication" and settings.task.path is None:
        return None  # on the Hub
    if settings.task.path is not None and not Path(settings.task.path).exists():
        return None
    task = load_task(settings)
    texts = []
    for example in [*task.train[:_PROBLEMS], *task.eval[:_PROBLEMS]]:
        if not isinstance(example.prompt, str):
            return None  # chat messages, which only the model's own template can write
        texts.append(render_prompt(task, example, None, settings.task.model_copy(update={"chat": "never"})))
    around = 0 if settings.task.chat == "never" or _has_no_template(settings) else _CHAT_TOKENS
    path = find_file(settings.model.name, "tokenizer.json", settings.model.revision)
    if path is None:
        return around + max((round(len(text) / _LETTERS) for text in texts), default=0)
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(path)).encode_batch(texts)
    return around + max((len(each.ids) for each in encoded), default=0)


def _has_no_template(settings: Settings) -> bool:
    """Whether the model's tokenizer is at hand and has no chat template."""
    found = find_file(settings.model.name, "tokenizer_config.json", settings.model.revision)
    if found is None or (found.parent / "chat_template.jinja").is_file():
        return False
    return "chat_template" not in found.read_text(encoding="utf-8")
