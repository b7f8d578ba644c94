"""Shows runs in a notebook: a table and curves while one trains, and its result.

Makes HTML and SVG that need nothing from elsewhere and follow the notebook's colours. Whatever comes from
outside is escaped. IPython is imported only inside a notebook.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from twig.common.progress import Progress
from twig.common.text import one_line, percent, shortened
from twig.report.curves import CHARTS, Chart
from twig.report.figures import Figures, accuracy_rows, accuracy_words
from twig.runs.reader import KINDS, missing_kinds

_SECONDS_BETWEEN = 0.5
_ROWS, _MESSAGES = 5, 6
_LONGEST_PROMPT, _LONGEST_ANSWER = 300, 600  # characters
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 330, 130, 54, 24, 20
_POINTS = 400  # of a curve, at most
_MEAN_OF = 9  # steps, about the middle one
_COLOUR = "#3b82c4"
_CELL = (
    "padding:2px 12px 2px 0;vertical-align:top;border:none;background:none;white-space:pre-wrap;"
    "overflow-wrap:anywhere"
)
_SVG = 'xmlns="http://www.w3.org/2000/svg" font-size="11" font-family="sans-serif" fill="currentColor"'
_AXES = 'fill="none" stroke="currentColor" stroke-opacity="0.3"'
_SHOWN = ("reward", "answers/right")


def in_notebook() -> bool:
    """Tells whether the code runs in a notebook's kernel, which shows HTML."""
    python = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress(Progress):
    """Shows a table of the last steps and curves of reward and right answers, redrawn in their cell."""

    def __init__(self) -> None:
        self.figures = Figures()
        self.rows: list[dict[str, Any]] = []
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.messages: list[str] = []
        self.status, self.shown_at = "", float("-inf")
        self.handle: Any = None
        self.total = self.done_units = 0
        self.phase_name = ""

    def phase(self, name: str, total: int | None = None) -> None:
        self.phase_name, self.total, self.done_units = name, total or 0, 0
        if name in ("loading", "evaluating"):
            self._show(now=True)

    def advance(self, count: int = 1) -> None:
        self.done_units += count
        self._show()

    def resumed(self, totals: Mapping[str, Any]) -> None:
        self.figures.resume(totals)

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        self.figures.add(metrics)
        self.rows.append({name: metrics.get(name) for name in _STEP_COLUMNS} | {"step": step})
        left = self.figures.left(step, total)
        self.status = f"step {step} of {total}" + (f", {left}" if left else "")
        self._show(now=step in (1, total))

    def evaluation(self, when: str, result: dict[str, Any]) -> None:
        self.evaluations[when] = result
        self._show(now=True)

    def message(self, text: str) -> None:
        self.messages.append(one_line(text))
        self._show(now=True)

    def notice(self, text: str) -> None:
        self.message(text)

    def done(self, summary: dict[str, Any]) -> None:
        self.status, self.phase_name = f"{summary['status']}, {summary['steps']} steps", ""
        self._show(now=True)

    def close(self) -> None:
        """Shows what a run that ended early came to."""
        self.phase_name = ""
        self._show(now=True)

    def html(self) -> str:
        """Returns the display as it is now."""
        of = f" {self.done_units} of {self.total}" if self.total and self.phase_name == "evaluating" else ""
        head = ", ".join(part for part in (self.status, f"{self.phase_name}{of}") if part)
        parts = [f"<div><b>{escape(head)}</b></div>" if head else ""]
        parts += [
            f"<div>{escape(when)}: {escape(accuracy_words(row))}</div>"
            for when, row in self.evaluations.items()
            if when in ("before", "after") or when == [*self.evaluations][-1]
        ]
        if self.rows:
            parts += [curves_html(self.rows, _SHOWN), _steps_table(self.rows[-_ROWS:])]
            parts.append(f"<div>{escape(', '.join(self.figures.tokens()))}</div>")
        parts += [f"<div>{escape(line)}</div>" for line in self.messages[-_MESSAGES:]]
        return f'<div style="font-size:13px;line-height:1.6">{"".join(parts)}</div>'

    def _show(self, now: bool = False) -> None:
        if not now and time.monotonic() - self.shown_at < _SECONDS_BETWEEN:
            return
        self.shown_at = time.monotonic()
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        if self.handle is None:
            self.handle = display(HTML(self.html()), display_id=True)
        else:
            self.handle.update(HTML(self.html()))


# ---- tables ----------------------------------------------------------------------------------------------

_STEP_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step": ("step", str),
    "reward": ("reward", "{:.3f}".format),
    "answers/right": ("right", percent),
    "completions/mean_length": ("mean tokens", "{:.1f}".format),
    "tokens/sampled": ("tokens sampled", "{:,}".format),
    "tokens/selected": ("tokens trained", "{:,}".format),
    "time/step": ("seconds", "{:.2f}".format),
}


def _steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    texts = [
        ["-" if row.get(key) is None else show(row[key]) for key, (_, show) in _STEP_COLUMNS.items()]
        for row in rows
    ]
    return table_html([title for title, _ in _STEP_COLUMNS.values()], texts)


def table_html(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str = "right") -> str:
    """Returns a table of texts."""

    def line(tag: str, texts: Sequence[str]) -> str:
        cell = f'<{tag} style="{_CELL};text-align:{align}">'
        return "<tr>" + "".join(f"{cell}{escape(text)}</{tag}>" for text in texts) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<table style="border:none;font-size:13px">{line("th", titles)}{body}</table>'


def accuracies_html(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Returns a table of the accuracy before and after training."""
    if not (before or after):
        return "<div>accuracy not measured</div>"
    titles, *rows = accuracy_rows({"before": before, "after": after})
    return table_html(titles, rows)


def answers_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns problems with the answers before and after training (`reader.answers_of`)."""
    texts = []
    for row in rows:
        answers = [
            f"{'right' if row[when]['right'] else 'wrong'}: "
            + shortened(row[when]["text"].strip(), _LONGEST_ANSWER)
            for when in ("before", "after")
        ]
        texts.append([KINDS[row["kind"]], one_line(row["prompt"], _LONGEST_PROMPT), *answers])
    missing = "".join(f"<div>{escape(line)}</div>" for line in missing_kinds(rows))
    return table_html(["", "problem", "answer before", "answer after"], texts, "left") + missing


# ---- curves ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """Curves of a run, which a notebook draws; `save` writes them as an HTML file."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "Plot(...): a notebook draws it; .save('plot.html') writes it"

    def save(self, path: str | Path) -> Path:
        """Writes the curves to an HTML file and returns its path."""
        path = Path(path)
        path.write_text(f"<!doctype html><meta charset='utf-8'>{self.html}", encoding="utf-8")
        return path


def curves_html(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Returns a curve over the steps for each metric that the rows have."""
    charts = {chart.metric: chart for chart in CHARTS}
    figures = []
    for metric in metrics:
        points = [(row["step"], row[metric]) for row in rows if _is_number(row.get(metric))]
        if points:
            figures.append(_svg(charts.get(metric) or Chart(metric, metric, "", ""), points))
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(figures)}</div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _svg(chart: Chart, points: Sequence[tuple[int, float]]) -> str:
    """Draws one curve, and a smoothed one over it if it is noisy."""
    stride = -(-len(points) // _POINTS)
    smooth = [(step, _mean(points, i)) for i, (step, _) in enumerate(points)]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    low, high = (low - 0.5 * (low == high), high + 0.5 * (low == high))
    first, last = points[0][0], points[-1][0]

    def place(step: float, value: float) -> str:
        x = _LEFT + (step - first) / max(last - first, 1) * (_WIDTH - _LEFT - 8)
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def line(curve: Sequence[tuple[int, float]], opacity: float) -> str:
        spots = " ".join(place(*point) for point in curve[::stride])
        style = f'fill="none" stroke="{_COLOUR}" stroke-width="1.6" stroke-opacity="{opacity}"'
        return f'<polyline points="{spots}" {style}/>'

    def text(x: float, y: float, words: str, anchor: str, bold: str = "") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {bold}>{escape(words)}</text>'

    show = percent if chart.unit == "share" else "{:.3g}".format
    latest = show(smooth[-1][1] if chart.noisy else values[-1])
    bottom = _HEIGHT - _BOTTOM
    parts = [
        text(_LEFT, 14, f"{chart.title}: {latest}", "start", 'font-weight="bold"'),
        text(_LEFT - 6, _TOP + 6, show(high), "end"),
        text(_LEFT - 6, bottom, show(low), "end"),
        text(_LEFT, _HEIGHT - 4, str(first), "start"),
        text(_WIDTH - 8, _HEIGHT - 4, f"step {last}", "end"),
        f'<path d="M{_LEFT},{_TOP}V{bottom}H{_WIDTH - 8}" {_AXES}/>',
        *([line(points, 0.3), line(smooth, 1)] if chart.noisy else [line(points, 1)]),
    ]
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    label = f'role="img" aria-label="{escape(chart.title, quote=True)} over the steps"'
    return f"<svg {_SVG} {size} {label}>{''.join(parts)}</svg>"


def _mean(points: Sequence[tuple[int, float]], i: int) -> float:
    """Returns the mean of the steps about step i, fewer at both ends."""
    reach = _MEAN_OF // 2
    near = [value for _, value in points[max(i - reach, 0) : i + reach + 1]]
    return sum(near) / len(near)
