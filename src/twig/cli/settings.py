"""Defines the command `twig settings`: a configuration of TRL's command line as settings."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def settings_command(
    source: Annotated[
        Path, typer.Option("--from", metavar="FILE", help="A YAML file for TRL's command line, `trl grpo`.")
    ],
) -> None:
    """Print the settings that a YAML file of TRL becomes."""
    from twig.trl.yaml_file import settings_of_yaml

    sys.stdout.write(settings_of_yaml(source))
