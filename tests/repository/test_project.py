"""Policies of the project, as tests: imports, a light command line, one name per thing, versions."""

import ast
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import MODULES, ROOT, SOURCE, WITH_TORCH

import twig

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "transformers", "matplotlib")
LAYERS = next(
    contract["layers"]
    for contract in PROJECT["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
)


def _run_python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    environ = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ, **options
    )


# Imports between packages: the contracts are in pyproject.toml, and `make lint` checks them


def _lint_imports(root) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return _run_python(code, cwd=root, env={"PYTHONPATH": os.pathsep.join(paths)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "reported"),
    [
        ("common/text.py", "from twig.config.schema import Frozen", "twig.common.text -> twig.config.schema"),
        (
            "core/trie.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import twig.training.train",
            "twig.core.trie -> twig.training.train",
        ),
        ("runs/reader.py", "def late():\n    import twig.cli.app", "twig.runs.reader -> twig.cli.app"),
        ("core/algorithms/grpo.py", "from . import rloo", "twig.core.algorithms.grpo"),
        ("attic/__init__.py", "", "attic"),
    ],
)
def test_a_broken_import_contract_is_reported(file, line, reported, tmp_path):
    """Upward; hidden from the interpreter; late; from a neighbour; in a package that has no place."""
    shutil.copytree(SOURCE, tmp_path / "src" / "twig", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "twig" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")
    done = _lint_imports(tmp_path)
    assert done.returncode != 0
    assert reported in done.stdout


def names_from_twig(source: str) -> set[str]:
    """Returns the names imported from `twig` itself, whose public ones come from every layer."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "twig" for alias in node.names}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_module_takes_no_public_name_from_twig_itself(module):
    assert names_from_twig(MODULES[module].read_text(encoding="utf-8")) <= {"__version__"}


def test_and_it_would_be_seen():
    assert names_from_twig("def late():\n    from twig import __version__, train") == {"__version__", "train"}


def test_every_package_has_a_layer_and_holds_only_a_docstring():
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(LAYERS)
    for name in LAYERS:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        names_itself = name == "trl"  # its names take the place of those that scripts import from TRL
        assert ast.get_docstring(tree) and (len(tree.body) == 1 or names_itself), name


def test_the_picture_of_the_house_is_current():
    spec = importlib.util.spec_from_file_location("twig_docs_house", ROOT / "scripts" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.PICTURE.read_text(encoding="utf-8") == house.drawn(), "run: python scripts/house.py"
    assert "(images/house.svg)" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_a_folder_has_at_most_twenty_modules():
    counted = Counter(path.parent.relative_to(SOURCE).as_posix() for path in MODULES.values())
    for folder in ("cli", "core/algorithms"):  # commands and algorithms are looked up by name
        counted.pop(folder)
    assert len(counted) > 10 and max(counted.values()) <= 20


def test_each_package_has_its_folder_of_tests():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(LAYERS) <= folders


# Light where it should be light


IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [key for key in sys.modules if key.partition(".")[0] == "twig"]:
        del sys.modules[loaded]
    importlib.import_module(name)
    heavy = [key for key in {heavy} if key in sys.modules]
    if heavy:
        sys.exit(f"{{name}} loads {{heavy}}")
print("all light")
"""


def test_importing_a_module_first_loads_nothing_heavy():
    """Imports each module before any other of twig, all in one process."""
    names = ["twig" if name == "__init__" else f"twig.{name}" for name in MODULES if name not in WITH_TORCH]
    done = _run_python(IMPORT_EACH.format(heavy=HEAVY), *names)
    assert (done.returncode, done.stdout) == (0, "all light\n"), done.stderr


def test_what_may_be_heavy_is_there():
    assert set(MODULES) >= WITH_TORCH


def test_importing_twig_imports_none_of_its_modules():
    """Exports are imported when first used. (For type checkers they stand under TYPE_CHECKING.)"""
    done = _run_python("import sys, twig; print([name for name in sys.modules if name.startswith('twig.')])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["runs", "src"]])
def test_the_command_line_loads_nothing_heavy_until_a_command_needs_it(arguments):
    code = f"import sys; sys.argv = ['twig', *{arguments}]\n"
    code += "from twig.cli.app import main\ntry:\n    status = main()\n"
    code += "except SystemExit as end:\n    status = end.code\n"
    code += f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])\nsys.exit(status)"
    done = _run_python(code)
    assert done.returncode == 0, done.stderr
    shown, _, heavy = done.stdout.partition("heavy:")
    assert heavy.strip() == "[]"
    assert "quickstart" in shown if arguments == ["recipes"] else "train" in shown


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
    """No two modules define a public function or class of the same name, apart from a few exceptions."""
    modules_of = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules_of.setdefault(node.name, []).append(module)
    assert len(modules_of) > 200
    twice = {name: modules for name, modules in modules_of.items() if len(modules) > 1}
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


def test_a_parametrised_test_without_cases_fails(pytestconfig):
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"


def test_warnings_are_errors(pytestconfig):
    assert pytestconfig.getini("filterwarnings")[0] == "error"


def test_versions_agree():
    """pyproject.toml, the changelog, the citation and the installed package name one version."""
    version = PROJECT["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert twig.__version__ == version


def test_the_pinned_versions_satisfy_the_bounds():
    """Every direct dependency has a line in constraints.txt that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in map(Requirement, itertools.chain(*groups)):
        assert versions.get(canonicalize_name(requirement.name)) in requirement.specifier, requirement


# Hooks and workflows

HABITS = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]


@pytest.mark.parametrize("path", HABITS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_hooks_and_workflows_are_yaml_and_call_what_exists(path):
    assert yaml.safe_load(path.read_text())
    for name in re.findall(r"(?:scripts|\.ci|tests)/[\w./]+", path.read_text()):
        assert (ROOT / name).exists(), name


def test_one_version_of_each_linter():
    """Hooks and `make lint` run the tools of .venv, whose versions are pinned."""
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in hooks} == {"local"}
    for tool in ("ruff", "basedpyright"):
        assert any(re.fullmatch(rf"{tool}==[\d.]+", each) for each in dev), tool
        assert any(f"-m {tool}" in hook["entry"] for hook in hooks[0]["hooks"]), tool
