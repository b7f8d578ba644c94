"""Defines the command `twig recipes`: the shipped recipes."""

from twig.cli.console import show_row
from twig.config.load import recipe_names, recipe_text


def recipes_command() -> None:
    """List the recipes."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        show_row(name.ljust(width), recipe_text(name).partition("\n")[0].lstrip("# "))
