"""Defines the command `twig schema`: the JSON schema of the settings."""

import json
import sys

from twig.config.load import json_schema


def schema_command() -> None:
    """Print the JSON schema of the settings, for editors."""
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
