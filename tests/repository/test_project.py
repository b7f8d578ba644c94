"""Policies of the project, kept as tests: imports, a light command line, one name per thing, lint."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
from project import MODULES, ROOT, SOURCE, WITH_TORCH

import twig

HEAVY = ("torch", "transformers", "matplotlib")
LAYERS = next(
    contract["layers"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
)


def _run_python(code: str, **options) -> subprocess.CompletedProcess:
    environ = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, **options
    )


# Imports between packages: the contracts are in pyproject.toml


def _linted(root) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return _run_python(code, cwd=root, env={"PYTHONPATH": os.pathsep.join(paths)})


def test_the_contracts_of_imports_are_kept():
    done = _linted(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("common/text.py", "from twig.config.schema import Frozen", "twig.common.text -> twig.config.schema"),
        (
            "core/trie.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import twig.training.train",
            "twig.core.trie -> twig.training.train",
        ),
        ("runs/reader.py", "def late():\n    import twig.cli.app", "twig.runs.reader -> twig.cli.app"),
        ("core/algorithms/grpo.py", "from .rloo import rloo", "twig.core.algorithms.grpo"),
        ("attic/__init__.py", "", "attic"),
    ],
)
def test_a_contract_that_is_broken_is_seen(file, line, said, tmp_path):
    """Upward, hidden from the interpreter, late, from a neighbour, in a package without a place."""
    shutil.copytree(SOURCE, tmp_path / "src" / "twig", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "twig" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")
    done = _linted(tmp_path)
    assert done.returncode != 0
    assert said in done.stdout


def names_from_twig(source: str) -> set[str]:
    """The names that are taken from `twig` itself, whose public ones come from every storey."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "twig" for alias in node.names}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_module_takes_no_public_name_from_twig_itself(module):
    assert names_from_twig(MODULES[module].read_text(encoding="utf-8")) <= {"__version__"}


def test_and_it_would_be_seen():
    assert names_from_twig("def late():\n    from twig import __version__, train") == {"__version__", "train"}


def test_every_package_has_a_storey_and_says_what_lives_there():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(LAYERS)
    for name in LAYERS:
        words = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
        assert "othing" in words, f"{name}: what does it know nothing about?"
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        assert len(tree.body) == 1, "a package holds a docstring: its names are in its modules"


def test_the_picture_of_the_house_is_current():
    spec = importlib.util.spec_from_file_location("twig_docs_house", ROOT / "scripts" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.PICTURE.read_text(encoding="utf-8") == house.drawn(), "run: python scripts/house.py"
    assert "(images/house.svg)" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_a_folder_has_no_more_modules_than_can_be_looked_through():
    counted = Counter(path.parent.relative_to(SOURCE).as_posix() for path in MODULES.values())
    for folder in ("cli", "core/algorithms"):  # commands and algorithms are looked up by name
        counted.pop(folder)
    assert len(counted) > 10 and max(counted.values()) <= 20


def test_each_package_has_its_folder_of_tests():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(LAYERS) <= folders


# Light where it should be light


@pytest.mark.parametrize("module", [name for name in MODULES if name not in WITH_TORCH])
def test_importing_it_loads_nothing_heavy(module):
    name = "twig" if module == "__init__" else f"twig.{module}"
    done = _run_python(f"import sys, {name}; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_may_be_heavy_is_there():
    assert set(MODULES) >= WITH_TORCH


def test_importing_twig_imports_none_of_its_modules():
    """Exports are imported when first used. (For type checkers they stand under TYPE_CHECKING.)"""
    done = _run_python("import sys, twig; print([name for name in sys.modules if name.startswith('twig.')])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("words", [["--help"], ["recipes"]])
def test_the_command_line_loads_nothing_heavy_until_a_command_needs_it(words):
    code = f"import sys; sys.argv = ['twig', *{words}]\n"
    code += "from twig.cli.app import main\ntry:\n    status = main()\n"
    code += "except SystemExit as end:\n    status = end.code\n"
    code += f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])\nsys.exit(status)"
    done = _run_python(code)
    assert done.returncode == 0, done.stderr
    shown, _, heavy = done.stdout.partition("heavy:")
    assert heavy.strip() == "[]"
    assert "quickstart" in shown if words == ["recipes"] else "train" in shown


# One name per thing


def test_every_export_exists_where_it_is_said_to_be():
    for name in twig.__all__:
        assert getattr(twig, name) is not None
    assert set(twig.__all__) == {"__version__", *twig._EXPORTS}
    with pytest.raises(AttributeError, match="trian"):
        twig.trian  # noqa: B018


def test_no_public_name_is_that_of_a_package():
    """Importing the package would replace it."""
    assert not set(twig.__all__) & {*MODULES, *LAYERS}


def test_one_name_is_one_thing():
    """No two modules of different packages define a public function or class of the same name, but for the
    `load` of tasks and settings, which is looked up in its module."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert len(found) > 200
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert set(twice) <= ALLOWED_TWICE, twice


ALLOWED_TWICE = {"load", "train", "read_answer", "Problem"}


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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert twig.__version__ == version
