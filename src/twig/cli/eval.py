"""The command `twig eval`: builds settings from its arguments, measures, and prints the result."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import Overrides, quiet_libraries, result_console
from twig.cli.display import accuracy_table, clean, comparison_words, quoted, sampled_table
from twig.cli.models import Named, named_model, saying_what_was_passed
from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.text import either
from twig.config.load import Settings
from twig.evaluation.record import read_evaluation, refuse_other_content, write_evaluation
from twig.report.progress import showing
from twig.runs.reader import any_graded
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
        int | None, typer.Option(metavar="N", min=1, help="Problems to answer. Without it: all.")
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
    other = None if against is None else read_evaluation(against)
    if output is not None:
        refuse_other_content(output)
    with named_model(model, best, "eval", overrides or ()) as named, saying_what_was_passed(Path(model)):
        settings = _settings_to_evaluate(named, model, task, overrides or [], limit)
        with showing(settings.log.progress) as progress:
            named.tell(progress.notice)
            measured = _evaluate(settings, samples, progress)
    record = measured.as_dict()
    if named.adapter is not None:  # not the temporary folder that a checkpoint's was written to
        record["adapter"] = record["settings"]["model"]["adapter"] = str(named.adapter.place)
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
        if not any_graded([*rows.values()]):
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
    named: Named, model: str, task: str | None, overrides: list[str], limit: int | None
) -> Settings:
    values = dict(named.values)
    if task is not None and task != values.get("task", {}).get("name"):
        values["task"] = {"name": task}
    if "task" not in values and not any(override.startswith("task.name=") for override in overrides):
        problem = f"not set, and {model} is not a run that has one"
        raise UserError("--task", problem, f"Add --task {either(list(TASKS))}")
    return Settings.from_dict(values, overrides if limit is None else [*overrides, f"eval.limit={limit}"])
