"""Defines the command `twig report`: runs as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import result_console
from twig.cli.display import clean
from twig.report.page import write_report
from twig.runs.folder import began
from twig.runs.listing import runs_in
from twig.runs.reader import is_run


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, or folders of runs.", autocompletion=complete_run
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Without it: report.html, in the folder of a single run."),
    ] = None,
) -> None:
    """Write runs as one HTML page: results, diagnosis, credit maps, curves, settings."""
    path = write_report([run for each in runs for run in _runs_of(each)], output)
    size = path.stat().st_size / 1e6
    result_console().print(Text(f"{clean(path)}  {size:.1f} MB"), soft_wrap=True)


def _runs_of(folder: Path) -> list[Path]:
    """Returns a run, or the runs in a folder that began; the folder if there are none, for the error."""
    if is_run(folder) or not folder.is_dir():
        return [folder]
    return [run for run in runs_in(folder) if began(run)] or [folder]
