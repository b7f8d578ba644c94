"""The wheel, built and installed outside the tree, finds its recipes and its embedded model."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel, built from a copy of the sources and without a network."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    # NOTE: not in place: a build writes into its tree, and takes up what an earlier build left there.
    left_out = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", sources / "src", ignore=left_out)
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(built), str(sources)]
    subprocess.run(PIP + build, check=True)
    (path,) = built.glob("twig_rl-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command of the installed wheel in an empty folder outside the tree."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(PIP + install, check=True)
    environ = os.environ | {"PYTHONPATH": str(site)}

    def run(*words):
        done = subprocess.run(words, cwd=elsewhere, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list(elsewhere.iterdir()) == []
        return done.stdout

    run.site = site
    return run


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"twig", wheel.name.split("-py3")[0] + ".dist-info"}
    assert not [name for name in names if "__pycache__" in name]
    files = [path for path in (ROOT / "src" / "twig").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 15
    assert {path.relative_to(ROOT / "src").as_posix() for path in files} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 8e6


def test_installed_package_is_the_one_that_runs(installed):
    found = installed(sys.executable, "-c", "import twig; print(twig.__file__, twig.__version__)").split()
    assert Path(found[0]) == installed.site / "twig" / "__init__.py"
    assert found[1] == "0.1.0"


def test_quickstart_is_ready_to_run_from_the_wheel(installed):
    """The command itself, as pip wrote it: it finds the recipe and the embedded model in the package."""
    command = shutil.which("twig", path=str(installed.site / "bin"))
    shown = installed(command, "train", "quickstart", "--dry-run")
    assert "tiny-arithmetic" in shown and "t-spmo" in shown
