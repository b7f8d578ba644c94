"""Defines the command `twig plan`: a run's memory, item by item, or what fits devices of given sizes."""

import io
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twig.cli.completion import complete_source
from twig.cli.console import Overrides, quiet_libraries, result_console
from twig.common.errors import UserError
from twig.common.text import format_size, one_line, parse_size
from twig.config.load import Settings, load
from twig.config.messages import write
from twig.config.schema import Model
from twig.config.sizes import SIZE_KEYS, with_free_sizes
from twig.engine.model_files import is_gguf
from twig.planner.ledger import Phase
from twig.planner.model_shape import find_file, read_config
from twig.planner.plan import PROMPT_TOKENS, Plan, budget_bytes, plan
from twig.report.progress import showing
from twig.runtime.machine import device_kind, free_memory
from twig.tasks.load import load_task
from twig.tasks.prompts import render_prompt

_DEVICES = {"cpu": "a CPU", "cuda": "a CUDA GPU", "mps": "an Apple GPU"}
_WAITING = 0.05  # the share of the measured time from which it is said that the machine had other work
_GIB = 2**30
_SMALL = 0.005  # of the peak: smaller items share a row
_PROBLEMS = 2000  # the most problems whose prompts are counted
_ASSUMED = {"svamp": 180, "gsm8k": 320}  # if their data is on the Hub: counted with Qwen2's tokenizer
_CHAT_TOKENS = 64  # the most tokens that a chat template puts around a prompt
_LETTERS = 2.5  # a token has more letters than that in nearly every text


def plan_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_FILE",
            help="A recipe, a YAML file or a run folder.",
            autocompletion=complete_source,
        ),
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
    measure: Annotated[
        bool, typer.Option("--measure", help="Train for some seconds here, to say how long the run takes.")
    ] = False,
) -> None:
    """Show how much memory a run needs, what to change if it does not fit, and how long it takes."""
    settings = load(source, overrides or ())
    if measure and sizes is not None:
        raise UserError("--measure", "it measures this machine, not those of --for", "Leave out one of them")
    if sizes is None:
        show_plan(result_console(), settings, prompt_tokens)
        show_time(result_console(), settings, measure)
    else:
        fixed = {override.partition("=")[0] for override in overrides or ()}
        show_devices(result_console(), settings, _sizes(sizes), fixed, prompt_tokens)


def plan_as_comment(settings: Settings, measure: bool = False) -> str:
    """Returns the plan for this machine as lines of YAML comment, or the reason why there is none."""
    text = io.StringIO()
    console = Console(file=text, width=108, highlight=False, color_system=None)
    try:
        show_plan(console, settings)
    except UserError as error:
        text.write(f"memory is not planned: {error}\n")
    show_time(console, settings, measure)
    return "".join(f"# {line}".rstrip() + "\n" for line in text.getvalue().strip().splitlines())


def show_plan(console: Console, settings: Settings, prompt_tokens: int | None = None) -> None:
    """Prints what each phase takes on this machine, and the sizes that were chosen, or what to change."""
    run = _run_of(settings, device_kind(settings.model.device), prompt_tokens)
    budget = budget_bytes(settings.memory.budget, free_memory(_named_device(settings, run.kind)))
    chosen = plan(run.config, settings, budget, run.kind, prompt_tokens=run.longest_prompt)
    _say(console, run.title, *chosen.notes, "")
    console.print(phases_table(chosen))
    if chosen.fits:
        fits = f"Fits: {format_size(chosen.peak)} of {format_size(budget)}. The quickest sizes that do:"
        _say(console, "", fits)
        console.print(chosen_table(chosen, settings))
    else:
        show_advice(console, "this machine", chosen)


def show_time(console: Console, settings: Settings, measure: bool) -> None:
    """Prints how long the run takes on this machine, measured, or how to measure it."""
    if not measure:
        _say(console, "", "How long it takes: add --measure, which trains here for some seconds.")
        return
    with showing(settings.log.progress) as progress:
        from twig.training.estimate import measure_run

        quiet_libraries()
        taken = measure_run(settings, progress)
    longest = settings.rollout.max_completion_length
    steps, per_step = f"{taken.steps:,} steps", f"{taken.seconds_per_step:.3g} s a step"
    lines = [f"{steps}: {duration(taken.training)}, {per_step}, {taken.tokens:,.0f} tokens sampled"]
    if taken.evaluations:
        evaluations = f"{taken.evaluations:,} evaluations of {taken.problems:,} problems"
        lines.append(f"{evaluations}: {duration(taken.evaluating)}")
    both = taken.training + taken.evaluating
    _say(console, "", f"Time, measured here over {taken.measured} steps: {duration(both)}.")
    _say(console, *(f"  {line}" for line in lines))
    if taken.waiting >= _WAITING:
        alone = duration(both * (1 - taken.waiting))
        share = f"{100 * taken.waiting:.0f} % of the time other work had the processor"
        _say(console, f"  {share}; if the machine does nothing else, it takes {alone}")
    if taken.mean_length < longest:
        growth = longest / max(taken.mean_length, 1)
        most, tokens = duration(taken.training * growth), f"{taken.tokens * growth:,.0f} tokens"
        length = f"{taken.mean_length:.0f} of at most {longest:,} tokens"
        then = f"the steps take up to {most} and sample {tokens}; less if they get shorter"
        _say(console, f"  completions had {length}; if they grow to that, {then}")


def duration(seconds: float) -> str:
    """Returns a time to plan with.

    >>> duration(80), duration(1000), duration(9000), duration(500_000)
    ('80 s', '17 min', '2.5 h', '5.8 days')
    """
    for most, size, unit, digits in ((120, 1, "s", 0), (7200, 60, "min", 0), (172800, 3600, "h", 1)):
        if seconds < most:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def show_devices(
    console: Console,
    settings: Settings,
    sizes: dict[str, int],
    fixed: Collection[str],
    prompt_tokens: int | None = None,
) -> None:
    """Prints what fits devices of these `sizes` (name to bytes), and what to change if nothing does.

    The sizes in the settings count only if their keys are `fixed`: set on the command line.
    """
    device = settings.model.device
    run = _run_of(settings, "cuda" if device == "auto" else device_kind(device), prompt_tokens)
    free = with_free_sizes(settings, fixed)
    plans = {
        name: plan(run.config, free, size, run.kind, prompt_tokens=run.longest_prompt)
        for name, size in sizes.items()
    }
    _say(console, run.title, *next(iter(plans.values())).notes, "")
    console.print(devices_table(plans))
    for name, each in plans.items():
        if not each.fits:
            show_advice(console, name, each)
    if any(each.fits for each in plans.values()):
        _say(console, "", "A run chooses these sizes itself, from the free memory of its device.")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _sizes(text: str) -> dict[str, int]:
    sizes = {}
    for name in (part.strip() for part in text.split(",")):
        size = parse_size(name)
        if size is None:
            raise UserError("--for", f"{name!r} is not a size", "Pass for example --for 4GiB,8GiB")
        sizes[name] = size
    return sizes


@dataclass(frozen=True)
class _Run:
    """What is planned: the model's config, the kind of device, the longest prompt, and these as a title."""

    config: dict[str, Any]
    kind: str
    longest_prompt: int
    title: str


def _run_of(settings: Settings, kind: str, prompt_tokens: int | None) -> _Run:
    config = _config_of(settings.model)
    counted = prompt_tokens or longest_prompt_at_hand(settings)
    longest = counted or assumed_prompt(settings)
    assumed = "" if counted else " (assumed; pass --prompt-tokens N)"
    if kind not in _DEVICES:
        raise UserError(
            "model.device", f"{kind!r} cannot be planned", "Set model.device to auto, cpu, cuda or mps"
        )
    name = one_line(settings.model.name)
    title = f"{name} on {_DEVICES[kind]}, prompts of up to {longest} tokens{assumed}"
    return _Run(config, kind, longest, title)


def _config_of(model: Model) -> dict[str, Any]:
    if not is_gguf(model):
        return read_config(model.name, model.revision)
    from twig.engine.load import load_config

    return load_config(model).to_dict()


def _named_device(settings: Settings, kind: str) -> str:
    return kind if settings.model.device == "auto" else settings.model.device


# ---- tables ----------------------------------------------------------------------------------------------


def phases_table(chosen: Plan) -> Table:
    """Returns a table of the phases at their peaks: a row for each item, the largest first."""
    unit, name = (_GIB, "GiB") if chosen.peak >= _GIB else (2**20, "MiB")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{name} at the peak of")
    for phase in chosen.phases:
        table.add_column(phase.name, justify="right")
    columns = [{item.name: item.size for item in phase.items} for phase in chosen.phases]
    largest = {key: max(column.get(key, 0) for column in columns) for column in columns for key in column}
    small = {key for key, size in largest.items() if size < _SMALL * chosen.peak}
    for column in columns:
        column["the rest"] = sum(column.pop(key, 0) for key in small)

    def number(size: int) -> str:
        text = f"{size / unit:.{2 if unit == _GIB else 0}f}"
        return text if float(text) else ""

    for key in sorted(set(largest) - small, key=lambda key: -largest[key]):
        table.add_row(key, *(number(column.get(key, 0)) for column in columns))
    if small:
        table.add_row("the rest", *(number(column["the rest"]) for column in columns))
    sums = (Text(number(phase.peak), style=_bold_peak(phase, chosen)) for phase in chosen.phases)
    table.add_row(Text("together", style="bold"), *sums)
    return table


def chosen_table(chosen: Plan, settings: Settings) -> Table:
    """Returns a table of a plan's sizes by their keys; "as set" marks those in the settings."""
    table = Table(box=None, pad_edge=False, show_header=False)
    flat = settings.flat()
    for key in SIZE_KEYS:
        table.add_row(f"  {key}", write(chosen.sizes.by_key()[key]), "" if flat[key] is None else "as set")
    return table


def _bold_peak(phase: Phase, chosen: Plan) -> str:
    return "bold" if phase.peak == chosen.peak else ""


def devices_table(plans: dict[str, Plan]) -> Table:
    """Returns a table of what fits which device: peak of each phase, whether that fits, the chosen sizes."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("\npeak, GiB")
    for phase in next(iter(plans.values())).phases:
        table.add_column(f"\n{phase.name}", justify="right", no_wrap=True)
    table.add_column("\nfits", justify="right")
    for title in ("sampled\nat once", "tokens\na pack", "layers\nrun"):
        table.add_column(title, justify="right")
    for name, chosen in plans.items():
        peaks = (Text(f"{phase.peak / _GIB:.2f}", style=_bold_peak(phase, chosen)) for phase in chosen.phases)
        fits = Text("yes", style="green") if chosen.fits else Text("no", style="bold red")
        sizes = chosen.sizes
        runs = "twice" if sizes.checkpoint_layers else "once"
        table.add_row(Text(name), *peaks, fits, str(sizes.wave_size), str(sizes.pack_size), runs)
    return table


def show_advice(console: Console, name: str, chosen: Plan) -> None:
    """Prints what a plan that does not fit lacks, and a row for each change, on top of those above it."""
    lacks = format_size(chosen.peak - chosen.usable)
    _say(console, "", f"{name}: {lacks} too little. Change, the cheapest first, each with those above:")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for each in chosen.advice:
        table.add_row(Text(f"  {each.changes}"), format_size(each.peak), "fits" if each.fits else "")
    if not chosen.advice or not chosen.advice[-1].fits:
        table.add_row("  a smaller model", "", "")
    console.print(table)


# ---- how long prompts are --------------------------------------------------------------------------------


def assumed_prompt(settings: Settings) -> int:
    """Returns the assumed tokens of the longest prompt, for data that is not at hand."""
    return _ASSUMED.get(settings.task.name, PROMPT_TOKENS)


def longest_prompt_at_hand(settings: Settings) -> int | None:
    """Estimates the tokens of the task's longest prompt, rather too many; None if its data is not at hand.

    Counts with the model's tokenizer if that is at hand too, else from the number of letters.
    """
    if settings.task.name != "multiplication" and settings.task.path is None:
        return None  # on the Hub
    if settings.task.path is not None and not Path(settings.task.path).exists():
        return None
    if settings.task.name == "multiplication":  # all are nearly as long as each other
        settings = _fewer_problems(settings)
    # A plan needs only prompts, so no reward file is run.
    task = replace(load_task(settings, reward_funcs=[len]), chat="never")
    texts = []
    for example in [*task.train[:_PROBLEMS], *task.eval[:_PROBLEMS]]:
        if not isinstance(example.prompt, str):
            return None  # chat messages, which only the model's own template can write
        texts.append(render_prompt(task, example, None))
    around = 0 if settings.task.chat == "never" or _has_no_template(settings) else _CHAT_TOKENS
    path = _file_of(settings.model, "tokenizer.json")
    if path is None:
        return around + max((round(len(text) / _LETTERS) for text in texts), default=0)
    from tokenizers import Tokenizer

    try:
        encoded = Tokenizer.from_file(str(path)).encode_batch(texts)
    except Exception as error:  # the library raises no other kind
        raise UserError(
            "model.name", f"{path} is damaged ({error})", "Copy it again, or pass --prompt-tokens N"
        ) from error
    return around + max((len(each.ids) for each in encoded), default=0)


def _file_of(model: Model, file: str) -> Path | None:
    return None if is_gguf(model) else find_file(model.name, file, model.revision)


def _fewer_problems(settings: Settings) -> Settings:
    sizes = {key: min(getattr(settings.task, key) or 500, 500) for key in ("train_size", "eval_size")}
    return settings.model_copy(update={"task": settings.task.model_copy(update=sizes)})


def _has_no_template(settings: Settings) -> bool:
    """Tells whether the model's tokenizer is at hand and has no chat template."""
    path = _file_of(settings.model, "tokenizer_config.json")
    if path is None or (path.parent / "chat_template.jinja").is_file():
        return False
    return "chat_template" not in path.read_text(encoding="utf-8")
