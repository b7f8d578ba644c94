"""Defines the command `twig show`: the saved completions of a step, and which of their tokens had credit."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import result_console
from twig.cli.display import clean
from twig.common.errors import UserError
from twig.common.text import either, one_line, percent
from twig.config.load import load
from twig.report.credit_map import saved_steps
from twig.runs.completions import read_completions
from twig.runs.reader import is_graded_run, is_run, read_metrics, read_summary

_STYLES = {"+": "bold bright_blue", "-": "bold yellow", "~": "bold magenta", "": ""}
_MEANING = {"+": "more likely", "-": "less likely", "~": "both, which cancel"}
_LONGEST = 20_000  # characters of a completion
_INDENT = 4


def show_command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", autocompletion=complete_run)
    ],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="A step. Without it: the newest that was saved.")
    ] = None,
    problem: Annotated[
        int | None, typer.Option(metavar="K", help="Only problem K, and all its completions.")
    ] = None,
    right: Annotated[
        bool | None, typer.Option("--right/--wrong", help="Only right, or only wrong completions.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Completions of each problem. Without it: 4, or all of one."),
    ] = None,
) -> None:
    """Show what a run sampled: problems, completions, rewards, and the tokens that were trained."""
    step, path = _file_of(run, step)
    problems = read_completions(path)
    shown = problems if problem is None else [rows for rows in problems if _number(rows) == problem]
    if not shown:
        numbers = sorted({_number(rows) for rows in problems})
        fix = f"Set --problem to {_nearest(numbers, problem or 0)}"
        raise UserError(f"--problem {problem}", f"it is not in step {step}", fix)
    limit = limit or (4 if problem is None else max(map(len, shown)))
    rows = [row for group in problems for row in group]
    console = result_console()
    metrics: list[dict[str, Any]] = []
    with suppress(OSError, UserError):  # completions can be read without them
        metrics = read_metrics(run)
    graded = is_graded_run(read_summary(run), metrics)
    _say(console, _title(step, rows, len(problems), graded))
    if any(row["weights"] is not None for row in rows):
        _say(console, _legend(_signs(console)))
    else:
        _say(console, Text("which tokens were trained is not in this file"))
    for group in shown:
        _show_problem(console, group, right, limit, graded)


def _file_of(run: Path, step: int | None) -> tuple[int, Path]:
    """Returns a saved step of a run, the newest by default, and its file."""
    if not is_run(run):
        raise UserError(str(run), "it holds no run", "Pass the folder of one, such as runs/quickstart-1")
    files = saved_steps(run)
    if not files:
        every = load(str(run)).log.completions_steps
        problem = "no completions are saved" + (", for log.completions_steps is 0" if every == 0 else " yet")
        fix = f"Set log.completions_steps={every or 25} to save those of step 1 and of every {every or 25}th"
        raise UserError(str(run), problem, fix)
    if step is None:
        step = max(files)
    if step not in files:
        fix = f"Set --step to {_nearest(list(files), step)}"
        raise UserError(f"--step {step}", "the completions of this step are not saved", fix)
    return step, files[step]


def _number(rows: Sequence[dict[str, Any]]) -> int:
    """Returns the number of a problem: its place in the data, as in the report."""
    return rows[0]["prompt_index"]


def _nearest(numbers: Sequence[int], number: int) -> str:
    near = sorted(sorted(numbers, key=lambda each: abs(each - number))[:5])
    return either([str(each) for each in near])


def _title(step: int, rows: Sequence[dict[str, Any]], num_problems: int, graded: bool) -> Text:
    result = f"{percent(sum(bool(row['right']) for row in rows) / max(len(rows), 1))} right"
    if graded:
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        result = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "no reward"
    return Text(f"step {step}: {num_problems} problems, {len(rows)} completions, {result}")


def _signs(console: Console) -> bool:
    """Returns whether tokens with credit need signs, because colours are not seen."""
    return console.color_system is None or console.no_color


def _legend(signs: bool) -> Text:
    text = Text("trained: ")
    for number, (kind, meaning) in enumerate(_MEANING.items()):
        text.append(", " if number else "")
        text.append(_marked(kind, meaning, signs), _STYLES[kind])
    return text.append("; the rest is not trained")


def _show_problem(
    console: Console, rows: Sequence[dict[str, Any]], right: bool | None, limit: int, graded: bool
) -> None:
    first = rows[0]
    _say(console, Text(f"\nproblem {_number(rows)}", style="bold"))
    _say(console, Text(clean(first["prompt"])), _INDENT)
    if first["prefix_length"]:
        _say(console, Text(f"it ends with {first['prefix_length']} tokens of an earlier completion"))
    if first["answer"] is not None:
        _say(console, Text(f"right answer: {one_line(first['answer'])}"))
    chosen = [row for row in rows if right is None or bool(row["right"]) == right]
    for row in chosen[:limit]:
        _say(console, Text(f"\n{_about(row, graded)}"))
        _say(console, _completion(row, _signs(console)), _INDENT)
    if not chosen:
        _say(console, Text(f"\nnone of {len(rows)} completions is {'right' if right else 'wrong'}"))
    elif len(chosen) > limit:
        _say(console, Text(f"\nand {len(chosen) - limit} more: --limit {len(chosen)}"))


def _about(row: dict[str, Any], graded: bool) -> str:
    """Returns a line about a completion: its number, its reward and length, and whether it is right.

    The last is left out if the rewards say more than that (`graded`).
    """
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.3f}"
    right = [] if graded else ["right" if row["right"] else "wrong"]
    parts = [f"completion {row['completion_index'] + 1}", *right, reward]
    functions = _rewards(row["rewards"])
    if len(functions) > 1:
        parts[-1] += f" ({', '.join(functions)})"
    if row["token_ids"] is not None:
        kinds = _kinds(row)
        trained = f", {sum(map(bool, kinds))} trained" if kinds else ""
        parts.append(f"{len(row['token_ids'])} tokens{trained}")
    return ", ".join([*parts, *([] if row["finished"] in (None, True) else ["cut off"])])


def _rewards(text: str | None) -> list[str]:
    """Returns the value of each reward function."""
    try:
        values = json.loads(text or "{}")
        return [
            f"{one_line(name, 40)} {'-' if value is None else f'{value:.3g}'}"
            for name, value in values.items()
        ]
    except (ValueError, TypeError, AttributeError):
        return []


def _kinds(row: dict[str, Any]) -> list[str]:
    """Returns what each token's credit did, a key of `_STYLES`; nothing if the file does not have it."""
    weights = row["weights"]
    if weights is None:
        return []
    parts = zip(weights, row["plus"] or weights, row["minus"] or weights, strict=True)
    return ["+" if w > 0 else "-" if w < 0 else "~" if plus or minus else "" for w, plus, minus in parts]


def _completion(row: dict[str, Any], signs: bool) -> Text:
    """Returns a completion's text, its tokens with credit marked."""
    tokens, kinds = row["tokens"], _kinds(row)
    if not tokens or len(tokens) != len(kinds) or not any(tokens):  # no texts, or they were removed
        return Text(clean(row["completion"]))
    text = Text()
    for kind, piece in _pieces(tokens, kinds):
        text.append(_marked(kind, clean(piece), signs), _STYLES[kind])
        if len(text) > _LONGEST:
            return text.append("...")
    return text


def _pieces(tokens: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    for kind, group in groupby(zip(kinds, tokens, strict=True), key=lambda each: each[0]):
        yield kind, "".join(token for _, token in group)


def _marked(kind: str, text: str, signs: bool) -> str:
    if kind:
        text = text.replace("\n", "\\n\n")  # a line end with credit is seen
    return f"[{kind}{text}{kind}]" if kind and signs else text


def _say(console: Console, text: Text, indent: int = 0) -> None:
    """Prints a text; on a terminal in lines that fit, indented."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
    else:
        console.print(text, soft_wrap=True)
