"""Sends the rows of metrics.jsonl to trackers too: TensorBoard, wandb, trackio (`log.report_to`).

Each is a separate package, imported only if it is set. Knows nothing of what the numbers mean.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.text import message_of

Report = Callable[[int, dict[str, Any]], None]

PROJECT = "twig"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def require(names: Sequence[str]) -> None:
    """Raises UserError for the first tracker that is not installed, with the command that installs it."""
    for name in names:
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(
                "log.report_to", f"{name} is not installed", f"Run {sys.executable} -m pip install {name}"
            ) from error


@contextmanager
def reporting(
    names: Sequence[str],
    folder: Path,
    settings: dict[str, Any],
    step: int = 0,
    on_trouble: Callable[[str], None] = lambda text: None,
) -> Iterator[Report]:
    """Yields a function that sends a step and its metrics to every tracker in `names`.

    TensorBoard writes to `folder`/tensorboard, where new rows replace those after `step`; the others open a
    run named after `folder`. Values that are not finite numbers are skipped. Raises UserError if a tracker
    does not start in a new run. One that fails later, or does not start in a resumed run, is left out from
    then on, and `on_trouble` is called with a line.
    """
    require(names)
    reports: dict[str, Report] = {}

    def leave_out(name: str, error: Exception, what: str) -> None:
        reports.pop(name, None)
        on_trouble(
            f"log.report_to: {name} {what} ({_fault(error)}) and is left out. metrics.jsonl has every row."
        )

    def report_all(step: int, metrics: dict[str, Any]) -> None:
        row = {key: value for key, value in metrics.items() if _is_number(value)}
        for name, report in list(reports.items()):
            try:
                report(step, row)
            except Exception as error:  # whatever a tracker raises without network or space
                leave_out(name, error, "fails")

    with ExitStack() as closing:
        for name in names:
            try:
                tracker = _START[name](import_module(_MODULES[name]), folder, settings, step)
            except Exception as error:  # as above, or without login
                if step > 0:
                    leave_out(name, error, "does not start")
                    continue
                raise UserError(
                    "log.report_to",
                    f"{name} does not start ({_fault(error)})",
                    f"Check that it runs by itself, or leave {name} out",
                ) from error
            reports[name] = tracker.report
            closing.callback(_closing, tracker.close, name, leave_out)
        yield report_all


def _closing(close: Callable[[], Any], name: str, leave_out: Callable[[str, Exception, str], None]) -> None:
    try:
        close()
    except Exception as error:
        leave_out(name, error, "does not end")


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {message_of(error, 300)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True)
class _Tracker:
    report: Report
    close: Callable[[], Any]


def _tensorboard(module: Any, folder: Path, settings: dict[str, Any], step: int) -> _Tracker:
    writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=step + 1)

    def report(step: int, row: dict[str, Any]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return _Tracker(report, writer.close)


def _wandb(module: Any, folder: Path, settings: dict[str, Any], step: int) -> _Tracker:
    run = module.init(project=PROJECT, name=folder.resolve().name, dir=str(folder), config=settings)
    return _Tracker(lambda step, row: run.log(row, step=step), run.finish)


def _trackio(module: Any, folder: Path, settings: dict[str, Any], step: int) -> _Tracker:
    run = module.init(project=PROJECT, name=folder.resolve().name, config=settings)
    return _Tracker(lambda step, row: run.log(row, step=step), run.finish)


_START = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
