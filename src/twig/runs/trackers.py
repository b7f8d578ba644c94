"""Trackers: programs outside Twig that get the rows of metrics.jsonl too (`log.report_to`).

Each is one of its own packages, imported only where it is asked for. Knows nothing of what the numbers mean.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    """Raises UserError, with the command that installs it, for the first tracker that is not there."""
    for name in names:
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(
                f"log.report_to: {name} is not installed; run: {sys.executable} -m pip install {name}"
            ) from error


@contextmanager
def reporting(
    names: Sequence[str],
    folder: Path,
    settings: dict[str, Any],
    step: int = 0,
    on_trouble: Callable[[str], None] = lambda words: None,
) -> Iterator[Report]:
    """Inside, what is yielded passes a row on to every tracker in `names`: the step and its metrics.

    TensorBoard writes to `folder`/tensorboard, where rows after `step` give way to new ones; the others open
    a run named after `folder`. A value that is not a finite number is left out. Raises UserError where a
    tracker does not start at the beginning of a run. One that fails, or does not start where a run goes on,
    is left out from there on, and `on_trouble` hears of it.
    """
    require(names)
    reports: dict[str, Report] = {}

    def leave_out(name: str, error: Exception, what: str) -> None:
        reports.pop(name, None)
        on_trouble(
            f"log.report_to: {name} {what} ({_fault(error)}) and is left out; metrics.jsonl has every row"
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
                report, close = _START[name](import_module(_MODULES[name]), folder, settings, step)
            except Exception as error:  # as above, or without login
                if step > 0:
                    leave_out(name, error, "does not start")
                    continue
                raise UserError(
                    f"log.report_to: {name} does not start ({_fault(error)}); "
                    f"see that it runs by itself, or leave {name} out"
                ) from error
            reports[name] = report
            closing.callback(_closing, close, name, leave_out)
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


def _tensorboard(
    module: Any, folder: Path, settings: dict[str, Any], step: int
) -> tuple[Report, Callable[[], Any]]:
    writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=step + 1)

    def report(step: int, row: dict[str, Any]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return report, writer.close


def _wandb(
    module: Any, folder: Path, settings: dict[str, Any], step: int
) -> tuple[Report, Callable[[], Any]]:
    run = module.init(project=PROJECT, name=folder.resolve().name, dir=str(folder), config=settings)
    return lambda step, row: run.log(row, step=step), run.finish


def _trackio(
    module: Any, folder: Path, settings: dict[str, Any], step: int
) -> tuple[Report, Callable[[], Any]]:
    run = module.init(project=PROJECT, name=folder.resolve().name, config=settings)
    return lambda step, row: run.log(row, step=step), run.finish


_START = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
