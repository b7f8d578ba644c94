"""A run as Python holds it: its folder, model and result, and how it shows itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twig.common.errors import UserError
from twig.common.tokenizer import Tokenizer
from twig.report.credit_map import saved_steps
from twig.report.figures import accuracy_rows
from twig.report.notebook import Plot, accuracies_html, answers_html, curves_html
from twig.report.page import NAME, write_report
from twig.runs.completions import read_completions
from twig.runs.reader import answers_of, read_metrics

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel

_PLOTTED = ("reward", "answers/right", "eval/accuracy", "completions/mean_length")


@dataclass(repr=False)
class Run:
    """A finished or stopped run: folder, trained model (PEFT, on its base), tokenizer and summary.json."""

    folder: Path
    model: "PeftModel"
    tokenizer: Tokenizer
    summary: dict[str, Any]

    @property
    def report(self) -> Path:
        """The run's report, an HTML file; it is written if it is missing."""
        path = self.folder / NAME
        return path if path.is_file() else write_report([self.folder])

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format."""
        return self.folder / "adapter"

    def completions(self, step: int | None = None) -> "DataFrame":
        """Returns the saved completions of a step, one row each; of the newest that was saved by default.

        Raises UserError if that step was not saved (`log.completions_steps`).
        """
        import pandas

        files = saved_steps(self.folder)
        if not files:
            raise UserError("completions", "none are saved", "Set log.completions_steps=25 for the next run")
        step = max(files) if step is None else step
        if step not in files:
            steps = ", ".join(map(str, sorted(files)))
            raise UserError("completions", f"those of step {step} are not saved", f"Pass one of {steps}")
        rows = [row for rows in read_completions(files[step]) for row in rows]
        for row in rows:
            row["num_tokens"] = len(row["token_ids"] or ())
            row["num_trained"] = sum(map(bool, row["weights"] or ()))
        names = ("prompt_index", "completion_index", "prompt", "answer", "completion", "reward", "right")
        return pandas.DataFrame(rows, columns=[*names, "finished", "num_tokens", "num_trained"])

    def plot(self, *metrics: str) -> Plot:
        """Returns curves over the steps: of `metrics`, by default reward, right answers, accuracy, length."""
        rows = read_metrics(self.folder)
        known = {name for row in rows for name in row}
        for metric in metrics:
            if metric not in known:
                raise UserError("plot", f"the run has no metric {metric!r}", _instead(metric, known))
        return Plot(curves_html(rows, metrics or _PLOTTED))

    def __repr__(self) -> str:
        before, after = (self.summary.get(f"accuracy_{when}") for when in ("before", "after"))
        (_, name, *_), *rows = accuracy_rows({"before": before, "after": after})
        result = f", {name} {' -> '.join(row[1] for row in rows)}" if before or after else ""
        return f"Run({str(self.folder)!r}: {self._what()}{result})"

    def _what(self) -> str:
        summary = self.summary
        return f"{summary['algorithm']} on {summary['task']}, {summary['steps']} steps, {summary['status']}"

    def _repr_html_(self) -> str:
        parts = [f"<b>{escape(self._what())}</b>"]
        parts.append(accuracies_html(self.summary.get("accuracy_before"), self.summary.get("accuracy_after")))
        parts.append(self.plot().html)
        parts.append(answers_html(answers_of(self.summary) or []) if answers_of(self.summary) else "")
        parts.append(f"<div>folder: {escape(str(self.folder))}</div>")
        return f'<div style="font-size:13px;line-height:1.6">{"".join(parts)}</div>'


def _instead(metric: str, known: Sequence[str] | set[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(metric, sorted(known), 3, 0.3)
    return f"Pass one of {', '.join(near or sorted(known)[:8])}"
