"""Run folders become one HTML page that needs nothing but a browser: no network, no other file.

The words and tables are made here, curves and credit maps are drawn by the page's own script from the data in
it. Text of models and users is data: escaped in the page, in JSON without a character that could end it, and
a content security policy lets nothing run but that script. Template, script and style are in assets/.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from twig import __version__
from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.common.text import percent
from twig.report.credit_map import Strings, choose, compared
from twig.report.curves import CHARTS, Arm, arm_series, arms_of, differing
from twig.report.diagnosis import SYMPTOMS, Finding, findings
from twig.report.history import RunData, read_run, settings_text

NAME = "report.html"
_MOST_BYTES = 4_900_000  # of a page
_MOST_CREDIT = 3_000_000  # of its credit maps
_SCRIPTS = ("text.js", "charts.js", "credit.js", "page.js")
_DASH = "–"


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of runs and returns its path: `output`, or report.html in the folder of the only run.

    Raises UserError where a folder holds no run, or the report cannot be written.
    """
    runs = [read_run(Path(folder)) for folder in dict.fromkeys(map(str, folders))]
    path = (
        Path(output) if output is not None else Path(runs[0].folder) / NAME if len(runs) == 1 else Path(NAME)
    )
    page = page_of(runs)
    try:
        write_whole(path, page.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); write another") from error
    return path


def report_of_run(folder: Path, tell: Callable[[str], None]) -> None:
    """Writes report.html into a run's folder, or tells why there is none.

    Raises nothing: no fault of a picture may cost a run its result.
    """
    try:
        write_report([folder])
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"{folder / NAME} is not written ({words}); to try again: twig report {folder}")


def page_of(runs: Sequence[RunData]) -> str:
    """The report of runs, as the text of an HTML page."""
    arms = arms_of(runs)
    order = [run for arm in arms for run in arm.runs]
    found = [findings(run.history) for run in order]
    data: dict[str, Any] = {
        "arms": [arm_series(arm, len(runs)) for arm in arms],
        "runs": [_run_row(run, number) for number, arm in enumerate(arms) for run in arm.runs],
        "charts": [asdict(chart) for chart in CHARTS],
    }
    parts = {
        "title": _escape(_title(arms)),
        "headline": _escape(_headline(arms)),
        "standfirst": _escape(_standfirst(arms)),
        "results": _results_table(arms),
        "diagnosis": _diagnosis(order, found),
        "settings": _settings(arms),
        "footer": _footer(order),
        "style": _asset("style.css"),
        "script": "\n".join(map(_asset, _SCRIPTS)),
    }
    room = _MOST_BYTES - len(json_text(data)) - sum(map(len, parts.values()))
    strings = Strings()
    groups = choose([(run.folder, run.settings) for run in order], strings, min(_MOST_CREDIT, room))
    data |= {"strings": strings.texts, "groups": groups, "notes": [_notes(run) for run in order]}
    parts |= {"data": json_text(data)}
    parts |= {f"{name}_hash": _hash(parts[name]) for name in ("script", "style")}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def json_text(value: Any) -> str:
    """JSON that may stand in a script element of a page: without <, >, & and line ends, and all in ASCII.

    >>> json_text({"a": "</script><!--"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    text = (files("twig.report") / "assets" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escape(value: Any) -> str:
    # What could not be seen, or would move other letters about, is written out.
    text = "".join(c if c.isprintable() or c in "\n\xa0" else repr(c)[1:-1] for c in str(value))
    return html.escape(text, quote=True)


# ---- words ------------------------------------------------------------------------------------------------


def _title(arms: list[Arm]) -> str:
    runs = [run for arm in arms for run in arm.runs]
    return f"{runs[0].name} {_DASH} Twig" if len(runs) == 1 else f"{len(runs)} runs {_DASH} Twig"


def _headline(arms: list[Arm]) -> str:
    runs = [run for arm in arms for run in arm.runs]
    if len(arms) == 1:
        before, after = (_mean_accuracy(arms[0], when) for when in ("before", "after"))
        steps = max(len(run.history) for run in runs)
        if before is not None and after is not None:
            return f"From {_unbroken_percent(before)} to {_unbroken_percent(after)} right in {steps:,} steps"
        return f"{arms[0].label}: {steps:,} steps"
    words = _numeral(len(arms))
    return f"{words} ways to train, {_numeral(len(runs)).lower()} runs"


def _standfirst(arms: list[Arm]) -> str:
    settings = arms[0].settings
    where = f"{settings.model.name} on {settings.task.name}"
    if len(arms) > 1:
        after = {arm.label: _mean_accuracy(arm, "after") for arm in arms}
        words = ", ".join(
            f"{label} {_unbroken_percent(value)}" for label, value in after.items() if value is not None
        )
        return f"{where}. Right after training: {words}." if words else f"{where}."
    arm = arms[0]
    sampled = sum(run.history.column("tokens/sampled").sum() for run in arm.runs)
    selected = sum(run.history.column("tokens/selected").sum() for run in arm.runs)
    seeds = f", {_numeral(len(arm.runs)).lower()} seeds" if len(arm.runs) > 1 else ""
    text = f"{arm.settings.algorithm.name} on {where.replace(' on ', ', ', 1)}{seeds}."
    if sampled:
        text += f" Of {sampled:,.0f} tokens that were sampled, {selected:,.0f} were trained"
        text += f": one in {sampled / selected:,.0f}." if selected and sampled > 2 * selected else "."
    return text


def _diagnosis(runs: list[RunData], found: list[list[Finding]]) -> str:
    rows: dict[tuple[str, str, str, bool], list[tuple[str, str]]] = {}
    for run, each in zip(runs, found, strict=True):
        for f in each:
            rows.setdefault((f.name, f.meaning, f.change, f.is_problem), []).append((run.name, f.seen))
    if not rows:
        return f'<p class="quiet">None of the {len(SYMPTOMS)} symptoms that Twig knows is in the numbers.</p>'
    parts = []
    for (name, meaning, change, is_problem), seen in sorted(rows.items(), key=lambda row: not row[0][3]):
        kind = "problem" if is_problem else "note"
        shown = seen if len(runs) > 1 else [("", seen[0][1])]
        items = "".join(
            f"<li>{f'<b>{_escape(run)}</b>: ' if run else ''}{_escape(words)}</li>" for run, words in shown
        )
        parts.append(
            f'<article class="finding {kind}"><h3><span class="kind">{kind}</span> {_escape(name)}</h3>'
            f"<ul>{items}</ul><p>{_escape(meaning)}</p>"
            f"<p><b>Change:</b> {_settings_as_code(change)}.</p></article>"
        )
    return "\n".join(parts)


def _settings_as_code(text: str) -> str:
    return re.sub(r"\b[a-z]+\.\w+(?:=[\w.]+\w)?", lambda match: f"<code>{match[0]}</code>", _escape(text))


def _notes(run: RunData) -> dict[str, str]:
    # What decides which tokens an algorithm trains, where that is a setting.
    notes = {}
    for name, options in compared(run.settings).items():
        if name == "s-grpo":
            late = "drawn without bias" if options.unbiased else f"each with p={options.p:g}"
            notes[name] = f"the first alpha={options.alpha} tokens, later ones {late}, up to k={options.k}"
    return notes


# ---- tables -----------------------------------------------------------------------------------------------


def _run_row(run: RunData, arm: int) -> dict[str, Any]:
    summary = run.summary
    parts = ("value", "low", "high", "n")
    return {
        "name": run.name,
        "arm": arm,
        "algorithm": run.settings.algorithm.name,
        "seed": run.settings.train.seed,
        **{
            when: [found[part] for part in parts] if (found := summary.get(f"accuracy_{when}")) else None
            for when in ("before", "after")
        },
    }


_RESULTS = ("Run", "Seed", "Before", "After", "Tokens sampled", "Trained", "Training", "Peak memory")


def _results_table(arms: list[Arm]) -> str:
    rows = []
    for arm in arms:
        if len(arms) > 1 or len(arm.runs) > 1:
            span = len(_RESULTS)
            rows.append(
                f'<tr class="arm"><th colspan="{span}" scope="colgroup">{_escape(arm.label)}</th></tr>'
            )
        for run in arm.runs:
            summary, history = run.summary, run.history
            sampled, selected = (history.column(f"tokens/{name}").sum() for name in ("sampled", "selected"))
            peak = summary.get("peak_memory_bytes")
            cells = (
                str(run.settings.train.seed),
                _interval(summary.get("accuracy_before")),
                _interval(summary.get("accuracy_after")),
                f"{sampled:,.0f}",
                f"{100 * selected / sampled:.1f} %" if sampled else _DASH,
                f"{summary['seconds']:,.0f} s" if summary.get("seconds") is not None else _DASH,
                f"{peak / 2**30:.2f} GiB" if peak else _DASH,
            )
            body = "".join(f"<td>{_escape(cell)}</td>" for cell in cells)
            rows.append(f'<tr><th scope="row">{_escape(run.name)}</th>{body}</tr>')
    return _table(_RESULTS, rows, "Results")


def _settings(arms: list[Arm]) -> str:
    found = differing(arms)
    parts = []
    if found:
        rows = [
            f'<tr><th scope="row"><code>{_escape(key)}</code></th>'
            + "".join(f"<td>{_escape(_DASH if value is None else _plain(value))}</td>" for value in values)
            + "</tr>"
            for key, values in found.items()
        ]
        parts.append(_table(("Setting", *(arm.label for arm in arms)), rows, "Settings that differ"))
    elif len(arms[0].runs) > 1:
        parts.append('<p class="quiet">The runs differ by their seed only.</p>')
    for arm in arms:
        title = "All settings" if len(arms) == 1 else f"All settings: {arm.label}"
        text = _escape(settings_text(arm.runs[0]))
        parts.append(
            f"<details><summary>{_escape(title)}</summary>"
            f'<pre tabindex="0" role="region" aria-label="{_escape(title)}">{text}</pre></details>'
        )
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: list[str], name: str) -> str:
    head = "".join(f'<th scope="col">{_escape(word)}</th>' for word in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _footer(runs: list[RunData]) -> str:
    facts = []
    for name, key in (("Device", "device_name"), ("Device", "device"), ("Number type", "dtype")):
        values = {str(run.environment[key]) for run in runs if run.environment.get(key)}
        if values and name not in [known for known, _ in facts]:
            facts.append((name, ", ".join(sorted(values))))
    versions = runs[0].environment.get("versions") or {}
    facts += [(name, versions[name]) for name in ("torch", "transformers", "peft") if versions.get(name)]
    commits = {str(run.environment["commit"]) for run in runs if run.environment.get("commit")}
    facts += [("Commit", ", ".join(sorted(commits)))] if commits else []
    words = "".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in facts)
    return f"<dl>{words}</dl><p>Made by Twig {_escape(__version__)} from the run folders' own files.</p>"


def _mean_accuracy(arm: Arm, when: str) -> float | None:
    found = [run.summary.get(f"accuracy_{when}") for run in arm.runs]
    values = [each["value"] for each in found if each]
    return sum(values) / len(values) if values else None


def _interval(accuracy: dict[str, Any] | None) -> str:
    if not accuracy:
        return _DASH
    low, high = (f"{100 * accuracy[end]:.1f}" for end in ("low", "high"))
    return f"{_unbroken_percent(accuracy['value'])} ({low} to {high})"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unbroken_percent(share: float) -> str:
    return percent(share).replace(" ", "\u00a0")


def _numeral(number: int) -> str:
    words = "No One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
    return words[number] if number < len(words) else f"{number:,}"
