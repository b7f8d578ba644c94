"""The command `twig plan`: what a run needs of memory, item by item, or what fits devices of given sizes."""

import io
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twig.cli.console import Overrides, result_console
from twig.common.errors import UserError
from twig.common.text import format_size, one_line, parse_size
from twig.config.load import Settings, load
from twig.config.messages import write
from twig.config.sizes import SIZE_KEYS, with_free_sizes
from twig.planner.model_shape import find_file, read_config
from twig.planner.plan import PROMPT_TOKENS, Plan, budget_bytes, plan
from twig.runtime.machine import device_kind, free_memory
from twig.tasks.load import load_task
from twig.tasks.prompts import render_prompt

_DEVICES = {"cpu": "a CPU", "cuda": "a CUDA GPU", "mps": "an Apple GPU"}
_GIB = 2**30
_SMALL = 0.005  # of the peak: smaller items share a row
_PROBLEMS = 2000  # whose prompts are counted
_ASSUMED = {"svamp": 180, "gsm8k": 320}  # where their data is on the Hub: counted with Qwen2's tokenizer
_CHAT_TOKENS = 64  # at most, that a chat template puts around a prompt
_LETTERS = 2.5  # a token has more in nearly every text


def plan_command(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe, a YAML file or a run folder.")
    ],
    overrides: Overrides = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="SIZE_KEYS", help="Devices, such as 4GiB,8GiB. Without it: this machine."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of the longest prompt. Without it: counted."),
    ] = None,
) -> None:
    """Show how much memory a run needs, and what to change where it does not fit."""
    settings = load(source, overrides or ())
    if sizes is None:
        show_plan(result_console(), settings, prompt_tokens)
    else:
        written = {word.partition("=")[0] for word in overrides or ()}
        show_devices(result_console(), settings, _sizes(sizes), written, prompt_tokens)


def plan_as_comment(settings: Settings) -> str:
    """The plan of this machine as lines of YAML comment, or why there is none."""
    text = io.StringIO()
    try:
        show_plan(Console(file=text, width=108, highlight=False, color_system=None), settings)
    except UserError as error:
        text.write(f"memory is not planned: {error}")
    return "".join(f"# {line}".rstrip() + "\n" for line in text.getvalue().strip().splitlines())


def show_plan(console: Console, settings: Settings, prompt_tokens: int | None = None) -> None:
    """Prints what each phase holds on this machine, and the sizes that were chosen, or what to change."""
    config, kind, longest, words = _asked(settings, device_kind(settings.model.device), prompt_tokens)
    budget = budget_bytes(settings.memory.budget, free_memory(_named_device(settings, kind)))
    found = plan(config, settings, budget, kind, prompt_tokens=longest)
    _say(console, words, *found.notes, "")
    console.print(phases_table(found))
    if found.fits:
        _say(
            console,
            "",
            f"Fits: {format_size(found.peak)} of {format_size(budget)}. The quickest sizes that do:",
        )
        console.print(chosen_table(found, settings))
    else:
        show_advice(console, "this machine", found)


def show_devices(
    console: Console,
    settings: Settings,
    sizes: dict[str, int],
    written: Collection[str],
    prompt_tokens: int | None = None,
) -> None:
    """Prints what fits devices of these `sizes` (name to bytes), and what to change where nothing does.

    Each is planned for anew, whatever the settings say but for the keys `written` on the command line.
    """
    wanted = settings.model.device
    kind = "cuda" if wanted == "auto" else device_kind(wanted)
    config, kind, longest, words = _asked(settings, kind, prompt_tokens)
    free = with_free_sizes(settings, written)
    plans = {name: plan(config, free, size, kind, prompt_tokens=longest) for name, size in sizes.items()}
    _say(console, words, *next(iter(plans.values())).notes, "")
    console.print(devices_table(plans))
    for name, each in plans.items():
        if not each.fits:
            show_advice(console, name, each)
    if any(each.fits for each in plans.values()):
        _say(console, "", "A run chooses these sizes itself, from what its device has free.")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _sizes(text: str) -> dict[str, int]:
    found = {word.strip(): parse_size(word) for word in text.split(",")}
    for word, size in found.items():
        if size is None:
            raise UserError(f"--for: {word!r} is not a size; write for example --for 4GiB,8GiB")
    return {word: size for word, size in found.items() if size is not None}


def _asked(settings: Settings, kind: str, prompt_tokens: int | None) -> tuple[dict[str, Any], str, int, str]:
    """The model's config, the kind of device, the longest prompt, and these in words."""
    config = read_config(settings.model.name, settings.model.revision)
    known = prompt_tokens or longest_prompt_at_hand(settings)
    longest = known or assumed_prompt(settings)
    assumed = "" if known else " (assumed; write --prompt-tokens N)"
    if kind not in _DEVICES:
        raise UserError(f"model.device: {kind!r} cannot be planned; write auto, cpu, cuda or mps")
    name = one_line(settings.model.name)
    words = f"{name} on {_DEVICES[kind]}, prompts of up to {longest} tokens{assumed}"
    return config, kind, longest, words


def _named_device(settings: Settings, kind: str) -> str:
    return kind if settings.model.device == "auto" else settings.model.device


# ---- tables ----------------------------------------------------------------------------------------------


def phases_table(found: Plan) -> Table:
    """What each phase holds at its peak: a row for each item, the largest first, the small ones together."""
    unit, name = (_GIB, "GiB") if found.peak >= _GIB else (2**20, "MiB")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{name} at the peak of")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    columns = [{item.name: item.size for item in phase.items} for phase in found.phases]
    largest = {key: max(column.get(key, 0) for column in columns) for column in columns for key in column}
    small = {key for key, size in largest.items() if size < _SMALL * found.peak}
    for column in columns:
        column["the rest"] = sum(column.pop(key, 0) for key in small)

    def number(size: int) -> str:
        text = f"{size / unit:.{2 if unit == _GIB else 0}f}"
        return text if float(text) else ""

    for key in sorted(set(largest) - small, key=lambda key: -largest[key]):
        table.add_row(key, *(number(column.get(key, 0)) for column in columns))
    if small:
        table.add_row("the rest", *(number(column["the rest"]) for column in columns))
    highest = found.peak
    sums = (Text(number(p.peak), style="bold" if p.peak == highest else "") for p in found.phases)
    table.add_row(Text("together", style="bold"), *sums)
    return table


def chosen_table(found: Plan, settings: Settings) -> Table:
    """The sizes of a plan by their keys, and which of them the settings had set."""
    table = Table(box=None, pad_edge=False, show_header=False)
    flat = settings.flat()
    for key in SIZE_KEYS:
        table.add_row(f"  {key}", write(found.sizes.by_key()[key]), "" if flat[key] is None else "as set")
    return table


def devices_table(plans: dict[str, Plan]) -> Table:
    """What fits where: the peak of each phase, whether that fits, and the sizes that were chosen."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("\npeak, GiB")
    for phase in next(iter(plans.values())).phases:
        table.add_column(f"\n{phase.name}", justify="right", no_wrap=True)
    table.add_column("\nfits", justify="right")
    for title in ("sampled\nat once", "tokens\na pack", "layers\nrun"):
        table.add_column(title, justify="right")
    for name, found in plans.items():
        peaks = (
            Text(f"{phase.peak / _GIB:.2f}", style="bold" if phase.peak == found.peak else "")
            for phase in found.phases
        )
        fits = Text("yes", style="green") if found.fits else Text("no", style="bold red")
        again = "twice" if found.sizes.checkpoint_layers else "once"
        table.add_row(Text(name), *peaks, fits, str(found.sizes.wave_size), str(found.sizes.pack_size), again)
    return table


def show_advice(console: Console, name: str, found: Plan) -> None:
    """Prints what a plan that does not fit lacks, and what to change: a row a change, each on top of those
    above it."""
    lacks = format_size(found.peak - found.usable)
    _say(
        console,
        "",
        f"{name}: {lacks} too little. Change, the cheapest first, each with those above:",
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for each in found.advice:
        table.add_row(Text(f"  {each.changes}"), format_size(each.peak), "fits" if each.fits else "")
    if not found.advice or not found.advice[-1].fits:
        table.add_row("  a smaller model", "", "")
    console.print(table)


# ---- how long prompts are --------------------------------------------------------------------------------


def assumed_prompt(settings: Settings) -> int:
    """Tokens of the longest prompt where the data is not at hand."""
    return _ASSUMED.get(settings.task.name, PROMPT_TOKENS)


def longest_prompt_at_hand(settings: Settings) -> int | None:
    """Tokens of the task's longest prompt, rather too many than too few; None where its data is not at hand.

    With the model's tokenizer where that is at hand too, else from the number of letters.
    """
    if settings.task.name != "multiplication" and settings.task.path is None:
        return None  # on the Hub
    if settings.task.path is not None and not Path(settings.task.path).exists():
        return None
    if settings.task.name == "multiplication":  # all are as long as each other, or nearly
        settings = _fewer_problems(settings)
    # Only prompts are needed: no reward file is run for a plan.
    task = load_task(settings, reward_funcs=[len])
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

    try:
        encoded = Tokenizer.from_file(str(path)).encode_batch(texts)
    except Exception as error:  # the library knows no other kind
        raise UserError(
            f"model.name: {path} is damaged ({error}); copy it again, or write --prompt-tokens N"
        ) from error
    return around + max((len(each.ids) for each in encoded), default=0)


def _fewer_problems(settings: Settings) -> Settings:
    sizes = {key: min(getattr(settings.task, key) or 500, 500) for key in ("train_size", "eval_size")}
    return settings.model_copy(update={"task": settings.task.model_copy(update=sizes)})


def _has_no_template(settings: Settings) -> bool:
    """Whether the model's tokenizer is at hand and has no chat template."""
    found = find_file(settings.model.name, "tokenizer_config.json", settings.model.revision)
    if found is None or (found.parent / "chat_template.jinja").is_file():
        return False
    return "chat_template" not in found.read_text(encoding="utf-8")
