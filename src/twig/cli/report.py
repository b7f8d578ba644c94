"""Defines the command `twig report`: runs as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import result_console
from twig.cli.display import clean
from twig.report.page import write_report


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders.", autocompletion=complete_run)
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Without it: report.html, in the folder of a single run."),
    ] = None,
) -> None:
    """Write runs as one HTML page: results, diagnosis, credit maps, curves, settings."""
    path = write_report(runs, output)
    size = path.stat().st_size / 1e6
    result_console().print(Text(f"{clean(path)}  {size:.1f} MB"), soft_wrap=True)
