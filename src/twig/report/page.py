"""Writes runs as one HTML page that needs nothing but a browser: no network, no other file.

The template in assets/ has the sections and tables; curves and credit maps are drawn by the page's own script
from the data in it. Text of models and users is data: Jinja2 escapes it in the page and in the JSON, and a
content security policy lets nothing run but that script.
"""

import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from twig import __version__
from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.common.text import percent, shortened
from twig.core.algorithms.registry import shipped
from twig.report.credit_map import Strings, choose, compared
from twig.report.curves import (
    CHARTS,
    Arm,
    accuracy_at,
    arm_series,
    arms_of,
    differing,
    is_graded_arm,
    tokens_of,
)
from twig.report.diagnosis import SYMPTOMS, Finding, findings, to_try
from twig.report.figures import figure_of
from twig.report.history import RunData, read_run, settings_text
from twig.runs.listing import short_names
from twig.runs.reader import KINDS, answers_of, missing_kinds, newest_step

NAME = "report.html"
_LONGEST_ANSWER, _MOST_ANSWERS = 2000, 6  # characters; arms whose answers are shown
_MOST_BYTES = 4_900_000  # of a page
_MOST_CREDIT = 3_000_000  # of its credit maps
_SCRIPTS = ("text.js", "charts.js", "credit.js", "page.js")
_DASH = "–"
_RELOAD = 60  # seconds between two looks of the page of a run that trains
_EQUAL = 1.02  # times as many tokens count as equally many
_UNFINISHED = {"running": "Training:", "stopped": "Stopped after", "failed": "Failed after"}


@dataclass(frozen=True)
class _Result:
    """A run's row in the table of results, formatted."""

    before: str
    after: str
    sampled: str
    trained: str
    seconds: str
    memory: str


@dataclass(frozen=True)
class _Seen:
    """What a symptom looks like in the run `name`."""

    name: str
    seen: str


@dataclass(frozen=True)
class _Answers:
    """Problems with a run's answers before and after training, and the kinds that there are none of."""

    name: str
    rows: list[dict[str, Any]]
    missing: list[str]


@dataclass(frozen=True)
class End:
    """How a run ended: its state, one of `runs.listing.STATES`, and the reason if it failed."""

    state: str
    reason: str | None = None


@dataclass(frozen=True)
class _Status:
    """What a page says of a run that is not finished: what happened, and a command for what to do."""

    name: str
    kind: str
    text: str
    command: str | None


@dataclass(frozen=True)
class _Shown:
    """A symptom and the runs that have it."""

    finding: Finding
    runs: list[_Seen]


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, end: End | None = None
) -> Path:
    """Writes the report of runs to `output` and returns its path.

    Without `output` that is report.html, in the run's folder if there is only one. `end` says how the runs
    ended, or that they did not, if the caller knows better than their folders. Raises UserError if a folder
    holds no run, or if the report cannot be written.
    """
    paths = [Path(folder) for folder in dict.fromkeys(map(str, folders))]
    names = zip(paths, short_names(paths), strict=True)
    ended = {} if end is None else asdict(end)
    runs = [replace(read_run(path), short_name=name, **ended) for path, name in names]
    path = Path(runs[0].folder) / NAME if len(runs) == 1 else Path(NAME)
    path = path if output is None else Path(output)
    page = page_of(runs)
    try:
        write_whole(path, page.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror})"
        raise UserError("--output", problem, "Pass --output FILE with another path") from error
    return path


def report_of_run(folder: Path, tell: Callable[[str], None], end: End | None = None) -> None:
    """Writes report.html into a run's folder, or calls `tell` with the reason why there is none.

    `end` is that of `write_report`.

    Raises nothing: no fault of a picture may cost a run its result.
    """
    try:
        write_report([folder], end=end)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"{folder / NAME} is not written ({reason}); to try again: twig report {folder}")


def report_if_missing(folder: Path, tell: Callable[[str], None]) -> None:
    """Writes the report of a finished run that was killed before it had one; see `report_of_run`."""
    if not (folder / NAME).is_file():
        report_of_run(folder, tell, End("finished"))


def page_of(runs: Sequence[RunData]) -> str:
    """Returns the report of runs as the text of an HTML page."""
    arms = arms_of(runs)
    runs = [run for arm in arms for run in arm.runs]
    data: dict[str, Any] = {
        "arms": [arm_series(arm, len(arms)) for arm in arms],
        "runs": [_run_row(run, number) for number, arm in enumerate(arms) for run in arm.runs],
        "charts": [asdict(chart) for chart in CHARTS],
        "algorithms": _algorithms(runs),
        "order": sorted(shipped(), key=lambda name: not shipped()[name].in_credit_map),
        "live": _RELOAD if any(run.state == "running" for run in runs) else 0,
        "written": round(time.time()),
    }
    parts = {
        "arms": arms,
        "runs": runs,
        "data": data,
        "title": _title(runs),
        "headline": _headline(arms, runs),
        "standfirst": _standfirst(arms),
        "result_of": _result,
        "live": data["live"],
        "statuses": [status for run in runs if (status := _status(run)) is not None],
        "answers": _answers(arms),
        "symptoms": _symptoms(runs),
        "num_symptoms": len(SYMPTOMS),
        "next_steps": to_try(runs[0].history) if len(runs) == 1 and runs[0].state == "finished" else [],
        "chat": f"twig chat {_here(runs[0])} --fork" if len(runs) == 1 and runs[0].history.rows else None,
        "differing": differing(arms),
        "settings_text": settings_text,
        "facts": _facts(runs),
        "version": __version__,
        "style": _asset("style.css"),
        "script": "\n".join(map(_asset, _SCRIPTS)),
    }
    render = _renderer()
    room = _MOST_BYTES - len(render(parts))
    strings = Strings()
    groups = choose([(run.folder, run.settings) for run in runs], strings, min(_MOST_CREDIT, room))
    data |= {"strings": strings.texts, "groups": groups, "notes": [_notes(run) for run in runs]}
    return render(parts)


def _renderer() -> Callable[[dict[str, Any]], str]:
    """Returns the template as a function of its values."""
    # Here, because every command imports this module, and few write a page.
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else _visible(value)

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"sha256": _sha256, "around_settings": _around_settings, "setting": _setting}
    return environment.get_template("page.html.jinja").render


def _asset(name: str) -> str:
    text = (files("twig.report") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _visible(value: Any) -> str:
    # Writes out what could not be seen, or would move other letters about.
    return "".join(c if c.isprintable() or c in "\n\xa0" else repr(c)[1:-1] for c in str(value))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _around_settings(text: str) -> list[str]:
    """Splits a text at the settings in it, which are the elements with an odd index.

    >>> _around_settings("a larger eval.limit, or model.dtype=float32")
    ['a larger ', 'eval.limit', ', or ', 'model.dtype=float32', '']
    """
    return re.split(r"(\b[a-z]+\.\w+(?:=[\w.]*\w)?)", text)


def _setting(value: Any) -> str:
    return _DASH if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---- texts ------------------------------------------------------------------------------------------------


def _title(runs: Sequence[RunData]) -> str:
    return f"{runs[0].name if len(runs) == 1 else f'{len(runs)} runs'} {_DASH} Twig"


def _headline(arms: list[Arm], runs: Sequence[RunData]) -> str:
    if len(arms) > 1:
        return f"{_numeral(len(arms))} ways to train, {_numeral(len(runs)).lower()} runs"
    before, after = (_mean_accuracy(arms[0], when) for when in ("before", "after"))
    steps = max(run.history.last_step for run in runs)
    state = runs[0].state
    if len(runs) == 1 and state in _UNFINISHED:
        return f"{_UNFINISHED[state]} {_step_of(runs[0])}"
    if before is not None and after is not None:
        graded = is_graded_arm(arms[0])
        ends = f"{_result_text(before, graded)} to {_result_text(after, graded)}"
        return f"{f'Reward from {ends}' if graded else f'From {ends} right'} in {steps:,} steps"
    return f"{arms[0].label}: {steps:,} steps"


def _standfirst(arms: list[Arm]) -> str:
    arm = arms[0]
    model, task = arm.settings.model.name, arm.settings.task.name
    if len(arms) > 1:
        after = {arm.label: _mean_accuracy(arm, "after") for arm in arms}
        graded = any(map(is_graded_arm, arms))
        values = [
            f"{label} {_result_text(value, graded)}" for label, value in after.items() if value is not None
        ]
        text = f"{model} on {task}."
        if len({run.problems for arm in arms for run in arm.runs} - {None}) > 1:
            return f"{text} The runs answered different problems, so their accuracies cannot be compared."
        equal = _at_equal_tokens(arms)
        if equal is not None:
            return f"{text} {equal}"
        what = "Mean reward" if graded else "Right"
        return f"{text} {what} after training: {', '.join(values)}." if values else text
    sampled = sum(run.history.column("tokens/sampled").sum() for run in arm.runs)
    selected = sum(run.history.column("tokens/selected").sum() for run in arm.runs)
    seeds = f", {_numeral(len(arm.runs)).lower()} seeds" if len(arm.runs) > 1 else ""
    text = f"{arm.settings.algorithm.name} on {model}, {task}{seeds}."
    if sampled:
        text += f" Of {sampled:,.0f} tokens that were sampled, {selected:,.0f} were trained"
        text += f": one in {sampled / selected:,.0f}." if selected and sampled > 2 * selected else "."
    return text


def _at_equal_tokens(arms: list[Arm]) -> str | None:
    """Compares arms where the shortest run ended; None if all sampled about as many tokens."""
    runs = [run for arm in arms for run in arm.runs]
    totals = [tokens_of(run) for run in runs]
    least, most = min(totals), max(totals)
    if not least or most <= _EQUAL * least:
        return None
    between = f"The runs sampled {least:,.0f} to {most:,.0f} tokens"
    values = [[accuracy_at(run, least) for run in arm.runs] for arm in arms]
    if any(value is None for each in values for value in each):
        return f"{between}, and lack the evaluations (eval.steps) to compare them at equal tokens."
    means = [sum(value for value in each if value is not None) / len(each) for each in values]
    graded = any(map(is_graded_arm, arms))
    what = "Mean reward" if graded else "Right"
    shown = [f"{arm.label} {_result_text(mean, graded)}" for arm, mean in zip(arms, means, strict=True)]
    where = "where the shortest ended, on straight lines between evaluations"
    return f"{between}. {what} after {least:,.0f} tokens, {where}: {', '.join(shown)}."


def _here(run: RunData) -> Path:
    """Returns a run's folder as a command line names it: from the working folder, or only its name."""
    folder = run.folder.resolve()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else Path(folder.name)


def _step_of(run: RunData) -> str:
    step, steps = run.history.last_step, run.steps
    return f"step {step:,}" + (f" of {steps:,}" if steps else "")


def _status(run: RunData) -> _Status | None:
    """Returns what a page says of a run that is not finished; None if it is."""
    command = f"twig train {_here(run)} --resume"
    saved = newest_step(run.folder)
    after = f"after {_step_of(run)}"
    if run.state == "running":
        text = f"Training: {_step_of(run)}. This page reloads itself."
        newest = run.evals[-1] if run.evals else {}
        if newest.get("eval/accuracy") is not None:
            text += f" The newest evaluation: {_unbroken_percent(newest['eval/accuracy'])} right."
        elif newest.get("eval/reward") is not None:
            text += f" The newest evaluation: reward {newest['eval/reward']:.3f}."
        return _Status(run.name, "running", text, None)
    if run.state == "stopped":
        return _Status(run.name, "stopped", f"Stopped {after}, and saved. To resume:", command)
    if run.state == "not begun":
        return _Status(run.name, "not begun", "No step and no evaluation is done. To begin:", command)
    if run.state != "failed":
        return None
    reason = run.reason or "it left no error, so it was killed, or its machine stopped"
    text = f"Failed {after}: {reason.rstrip('.')}."
    to_do = f"To resume from step {saved:,}:" if saved else "Nothing is saved; to start again:"
    return _Status(run.name, "failed", f"{text} {to_do}", command)


def _answers(arms: Sequence[Arm]) -> list[_Answers]:
    """Returns the answers of the first run of each arm that has any."""
    answers = []
    for arm in arms:
        rows_of = ((run.name, answers_of(run.summary)) for run in arm.runs)
        name, rows = next(((name, rows) for name, rows in rows_of if rows), ("", None))
        if rows:
            rows = [
                {**row, "title": KINDS[row["kind"]], **{key: _cut(row[key]) for key in ("before", "after")}}
                for row in rows
            ]
            answers.append(_Answers(name, rows, missing_kinds(rows)))
    return answers[:_MOST_ANSWERS]


def _cut(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"text": shortened(answer["text"].strip(), _LONGEST_ANSWER)}


def _symptoms(runs: Sequence[RunData]) -> list[_Shown]:
    """Returns the symptoms that any of the runs has, problems first."""
    by_name: dict[str, _Shown] = {}
    for run in runs:
        for finding in findings(run.history):
            by_name.setdefault(finding.name, _Shown(finding, [])).runs.append(_Seen(run.name, finding.seen))
    return sorted(by_name.values(), key=lambda shown: not shown.finding.is_problem)


def _notes(run: RunData) -> dict[str, str]:
    # What decides which tokens an algorithm trains, if that is a setting.
    described = {name: algorithm.describe() for name, algorithm in compared(run.settings).items()}
    return {name: text for name, text in described.items() if text}


def _algorithms(runs: Sequence[RunData]) -> dict[str, dict[str, str]]:
    algorithms = {name: algorithm for run in runs for name, algorithm in compared(run.settings).items()}
    return {
        name: {"title": algorithm.title or name, "summary": algorithm.summary}
        for name, algorithm in algorithms.items()
    }


# ---- values -----------------------------------------------------------------------------------------------


def _run_row(run: RunData, arm: int) -> dict[str, Any]:
    row = {
        "name": run.name,
        "arm": arm,
        "algorithm": run.settings.algorithm.name,
        "seed": run.settings.train.seed,
    }
    for when in ("before", "after"):
        accuracy = run.summary.get(f"accuracy_{when}")
        if run.graded:  # mean rewards have no interval
            accuracy = None
        row[when] = [accuracy[part] for part in ("value", "low", "high", "n")] if accuracy else None
    return row


def _result(run: RunData) -> _Result:
    summary = run.summary
    sampled, selected = (run.history.column(f"tokens/{name}").sum() for name in ("sampled", "selected"))
    seconds, peak = summary.get("seconds"), summary.get("peak_memory_bytes")
    return _Result(
        before=_interval(summary.get("accuracy_before"), run.graded),
        after=_interval(summary.get("accuracy_after"), run.graded),
        sampled=f"{sampled:,.0f}",
        trained=percent(selected / sampled) if sampled else _DASH,
        seconds=_DASH if seconds is None else f"{seconds:,.0f} s",
        memory=f"{peak / 2**30:.2f} GiB" if peak else _DASH,
    )


def _facts(runs: Sequence[RunData]) -> dict[str, str]:
    """Returns what the runs were made with, for the end of the page."""
    facts = {}
    environments = [run.environment for run in runs]
    for name, key in (("Device", "device_name"), ("Device", "device"), ("Number type", "dtype")):
        values = {str(environment[key]) for environment in environments if environment.get(key)}
        if values:
            facts.setdefault(name, ", ".join(sorted(values)))
    versions = environments[0].get("versions") or {}
    facts |= {name: versions[name] for name in ("torch", "transformers", "peft") if versions.get(name)}
    commits = {str(environment["commit"]) for environment in environments if environment.get("commit")}
    return facts | ({"Commit": ", ".join(sorted(commits))} if commits else {})


def _mean_accuracy(arm: Arm, when: str) -> float | None:
    accuracies = [run.summary.get(f"accuracy_{when}") for run in arm.runs]
    key = "reward" if is_graded_arm(arm) else "value"
    values = [accuracy[key] for accuracy in accuracies if accuracy and accuracy[key] is not None]
    return sum(values) / len(values) if values else None


def _interval(accuracy: dict[str, Any] | None, graded: bool) -> str:
    if not accuracy:
        return _DASH
    if graded:
        return figure_of(accuracy, True)
    low, high = (f"{100 * accuracy[end]:.1f}" for end in ("low", "high"))
    return f"{_unbroken_percent(accuracy['value'])} ({low} to {high})"


def _result_text(value: float, graded: bool) -> str:
    return f"{value:.3f}" if graded else _unbroken_percent(value)


def _unbroken_percent(share: float) -> str:
    return percent(share).replace(" ", "\u00a0")


def _numeral(number: int) -> str:
    numerals = "No One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
    return numerals[number] if number < len(numerals) else f"{number:,}"
