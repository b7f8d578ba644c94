"""The command `twig eval`: builds settings from its arguments, measures, and prints the result."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import Overrides, quiet_libraries, result_console
from twig.cli.display import accuracy_table, clean, comparison_words, quoted, sampled_table, showing
from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.text import either
from twig.config.load import Settings, load
from twig.evaluation.record import read_evaluation, refuse_other_content, write_evaluation
from twig.runs.reader import is_run
from twig.tasks.load import TASKS


def eval_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run folder, an adapter, or a model.",
            autocompletion=complete_run,
        ),
    ],
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task. Without it: the run's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Problems to answer. Without it: all.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Also N sampled answers to each: pass@k, vote.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write evaluation.json and completions.jsonl there.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with the evaluation written there.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="A run's best evaluated adapter, not the last.")
    ] = False,
) -> None:
    """Measure a model's accuracy, with a 95 % interval."""
    settings = _settings_to_evaluate(model, task, overrides or [], limit, best)
    other = None if against is None else read_evaluation(against)
    if output is not None:
        refuse_other_content(output)
    with showing(settings.log.progress) as progress:
        measured = _evaluate(settings, samples, progress)
    record = measured.as_dict()
    console = result_console()
    greedy = record["greedy"]
    rows = {settings.task.name: greedy}
    if other is not None:
        rows |= {quoted(other.folder): other.greedy}
    console.print(accuracy_table(rows))
    console.print(Text(f"\n{_details(greedy)}"), soft_wrap=True)
    if measured.sampled is not None:
        console.print(sampled_table(measured.sampled.as_dict()))
    if other is not None:
        record["against"] = str(against)
        record["comparison"] = comparison = measured.compare(other).as_dict()
        console.print(Text(comparison_words(comparison)), soft_wrap=True)
    if output is not None:
        write_evaluation(output, record, measured.rows)
        console.print(Text(f"written to {clean(output)}"), soft_wrap=True)


def _details(greedy: dict[str, Any]) -> str:
    """Returns what else the greedy answers show, on one line."""
    parts = []
    if greedy["found"] is not None:
        parts.append(f"answer found {100 * greedy['found']:.1f} %")
    if greedy["right_lenient"] is not None:
        parts.append(f"last number right {100 * greedy['right_lenient']:.1f} %")
    parts.append(f"mean length {greedy['mean_length']:.1f} tokens")
    parts.append(f"cut off {100 * greedy['truncated']:.1f} %")
    return ", ".join(parts)


def _evaluate(settings: Settings, samples: int | None, progress: Progress) -> Any:
    from twig.evaluation.evaluate import measure_model

    quiet_libraries()
    return measure_model(settings, samples, progress)


def _settings_to_evaluate(
    model: str, task: str | None, overrides: list[str], limit: int | None, best: bool
) -> Settings:
    if "=" in model and not Path(model).exists():
        raise UserError(model, "a setting in place of the model", f"Run twig eval MODEL_OR_RUN {model}")
    folder = Path(model)
    if best and not is_run(folder):
        raise UserError("--best", f"{model} is not a run", "Leave --best out, or name the folder of a run")
    if is_run(folder):
        values = load(model).model_dump()
        values["model"]["adapter"] = _adapter_of(folder, best)
    elif (folder / "adapter_config.json").is_file():
        values = {"model": {"name": _base_of(folder), "adapter": model}}
    else:
        values = {"model": {"name": model}}
    if task is not None and task != values.get("task", {}).get("name"):
        values["task"] = {"name": task}
    if "task" not in values and not any(override.startswith("task.name=") for override in overrides):
        problem = f"not set, and {model} is not a run that has one"
        raise UserError("--task", problem, f"Add --task {either(list(TASKS))}")
    return Settings.from_dict(values, overrides if limit is None else [*overrides, f"eval.limit={limit}"])


def _base_of(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        name = None
    if not isinstance(name, str) or not name:
        fix = f"Run twig eval MODEL --task NAME model.adapter={adapter}"
        raise UserError(str(file), "names no base model", fix)
    return name


def _adapter_of(folder: Path, best: bool) -> str:
    for name in ("adapter-best",) if best else ("adapter", "adapter-best"):
        if (folder / name / "adapter_config.json").is_file():
            return str(folder / name)
    raise UserError(str(folder), "the run has no adapter yet", f"Resume it: twig train {folder} --resume")
