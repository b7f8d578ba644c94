"""Policies of the project, kept as tests: import order, a light command line, one name per thing, lint."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twig

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "twig"

# A module imports only from those before it. A package itself comes after its modules.
ORDER = (
    "escape records redact files reach wording task_settings options settings config from_peft expressions "
    "answers "
    "tasks.functions tasks.calls tasks.base tasks.rewards tasks.data "
    "tasks.multiplication tasks.svamp tasks.gsm8k tasks.custom tasks "
    "trie noise credit objective pack models oom head decoder adapter policy drawing decode_graph rollout "
    "replay progress lifeline processes passes batch measures evaluate shape workload ledger footprint "
    "memory checkpoint machine usage sizing evaluations measure rows runlog resume randomness standing "
    "trackers signals watch symptoms diagnose series creditmap report "
    "trainer samples session loop study compare tables "
    "hub methods card export __init__ "
    "display cli_shared cli_compare cli_eval cli_export cli_plan cli_report cli "
    "__main__"
).split()

# These work where torch is not installed.
WITHOUT_TORCH = (
    "escape records redact files reach wording task_settings options settings config from_peft expressions "
    "answers tasks.functions tasks.calls tasks.base tasks.rewards tasks.data "
    "tasks.multiplication tasks.svamp tasks.gsm8k tasks.custom tasks "
    "trie noise credit pack replay progress lifeline processes measures shape workload ledger footprint "
    "memory machine usage sizing evaluations rows runlog standing trackers signals watch symptoms diagnose "
    "series creditmap report study compare tables hub methods card "
    "display cli_shared cli_compare cli_eval cli_export cli_plan cli_report cli"
).split()

HEAVY = ("torch", "transformers", "matplotlib")


def _module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(SOURCE.rglob("*.py")) if "assets" not in path.parts}


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of each import from within twig, also those in functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, _owner(name)) for name in names if name.split(".")[0] == "twig"]
    # Any module may read the version.
    return [(line, name) for line, name in found if name != "__version__"]


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if node.level == 0:
        return node.module or ""
    package = ["twig", *module.split(".")]
    if not any(name.startswith(module + ".") for name in ORDER):
        package = package[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _owner(name: str) -> str:
    """The module a dotted name comes from: twig.tasks.base.Task -> tasks.base, twig.train -> __init__."""
    if name == "twig.__version__":
        return "__version__"
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in ORDER:
        parts = parts[:-1]
    return ".".join(parts) or "__init__"


def upward_imports(source: str, module: str) -> list[str]:
    """The imports in `source` that do not come from a module before `module`, in words."""
    before = ORDER[: ORDER.index(module)]
    found = imports(source, module)
    return [f"{module}:{line} imports {name}" for line, name in found if name not in before]


def _run_python(code: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)


# Import order


def test_every_module_has_a_place_in_the_order():
    assert len(MODULES) >= 10
    assert set(MODULES) <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))
    assert set(WITHOUT_TORCH) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert upward_imports(source, module) == []


def test_importing_twig_imports_none_of_its_modules():
    """Exports are imported when first used. (For type checkers they stand under TYPE_CHECKING.)"""
    done = _run_python("import sys, twig; print([name for name in sys.modules if name.startswith('twig.')])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "source, module, expected",
    [
        ("from twig.records import Group", "trie", []),
        ("from twig import trie", "credit", []),
        ("from twig import __version__", "runlog", []),
        ("import twig.credit", "trie", ["trie:1 imports credit"]),
        ("from twig import credit", "trie", ["trie:1 imports credit"]),
        ("from twig import train", "loop", ["loop:1 imports __init__"]),
        ("from .credit import grpo", "trie", ["trie:1 imports credit"]),
        ("from ..trie import ROOT", "tasks.base", ["tasks.base:1 imports trie"]),
        ("from . import svamp", "tasks.base", ["tasks.base:1 imports tasks.svamp"]),
        ("from twig.tasks import Task", "tasks.base", ["tasks.base:1 imports tasks"]),
        ("from .base import Task", "tasks", []),
        ("if TYPE_CHECKING:\n    from twig.loop import train", "trie", ["trie:2 imports loop"]),
        ("def late():\n    import twig.loop", "trie", ["trie:2 imports loop"]),
    ],
)
def test_the_check_of_imports_sees_every_form(source, module, expected):
    assert upward_imports(source, module) == expected


# Light where it should be light


@pytest.mark.parametrize("module", ["__init__", *[name for name in WITHOUT_TORCH if name in MODULES]])
def test_importing_it_loads_nothing_heavy(module):
    name = "twig" if module == "__init__" else f"twig.{module}"
    done = _run_python(f"import sys, {name}; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("words", [["--help"], ["recipes"]])
def test_the_command_line_loads_nothing_heavy_until_a_command_needs_it(words):
    code = f"import sys; sys.argv = ['twig', *{words}]\n"
    code += "from twig.cli import main\ntry:\n    status = main()\n"
    code += "except SystemExit as end:\n    status = end.code\n"
    code += f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])\nsys.exit(status)"
    done = _run_python(code)
    assert done.returncode == 0, done.stderr
    shown, _, heavy = done.stdout.partition("heavy:")
    assert heavy.strip() == "[]"
    assert "quickstart" in shown if words == ["recipes"] else "train" in shown


# One name per thing


def _exports() -> dict[str, str]:
    return twig._EXPORTS


def test_every_export_exists_where_it_is_said_to_be():
    for name in twig.__all__:
        assert getattr(twig, name) is not None
    assert set(twig.__all__) == {"__version__", *_exports()}
    with pytest.raises(AttributeError, match="trian"):
        twig.trian  # noqa: B018


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli"])
def test_no_public_function_has_the_name_of_a_submodule(module):
    """Importing the submodule would replace the function. (In `cli` a function has its command's name.)"""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    submodules = {part for name in ORDER for part in name.split(".")}
    exported = set(twig.__all__) if module == "__init__" else set()
    assert (functions | exported) & submodules == set()


# Readable


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_enough_to_read(module):
    source = MODULES[module].read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= 65, f"{module}.{node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_each_file_says_what_it_does(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


def test_lint():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_parametrised_test_without_cases_fails(pytestconfig):
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"


def test_warnings_are_errors(pytestconfig):
    assert pytestconfig.getini("filterwarnings")[0] == "error"


def test_versions_agree():
    """pyproject.toml, the changelog, the citation and what is installed name one version."""
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert twig.__version__ == version
