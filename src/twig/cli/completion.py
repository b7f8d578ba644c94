"""Completes the arguments of commands in a shell: recipes, YAML files and run folders.

Called while a person types, so it imports no torch.
"""

from pathlib import Path

from twig.config.load import RUN_CONFIG, recipe_names


def complete_source(incomplete: str) -> list[str]:
    """Returns the recipes, YAML files and run folders that start with `incomplete`."""
    recipes = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*recipes, *_paths(incomplete, ("*.yaml", "*.yml")), *complete_run(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Returns the run folders that start with `incomplete`, those below `runs` too."""
    configs = _paths(incomplete, (f"*/{RUN_CONFIG}", f"runs/*/{RUN_CONFIG}"))
    return [str(Path(path).parent) for path in configs]


def complete_folder(incomplete: str) -> list[str]:
    """Returns the folders with runs in them that start with `incomplete`."""
    configs = _paths(incomplete, (f"*/*/{RUN_CONFIG}", f"*/runs/*/{RUN_CONFIG}"))
    folders = {Path(config).parent.parent for config in configs}
    return sorted(str(folder) for folder in folders if not (folder / RUN_CONFIG).exists())


def _paths(incomplete: str, patterns: tuple[str, ...]) -> list[str]:
    """Returns the paths of the patterns in the folder that `incomplete` names, as they would be typed."""
    folder = Path(incomplete[: incomplete.rfind("/") + 1])
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return [str(path) for path in paths if str(path).startswith(incomplete) and path.name[0] != "."]
