"""The wheel, built from a copy of the sources and installed into an empty environment, trains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel, built without a network."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    # NOTE: a copy, because a build writes into its tree and includes what an earlier build left there.
    left_out = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", sources / "src", ignore=left_out)
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(built), str(sources)]
    subprocess.run(PIP + build, check=True)
    (path,) = built.glob("twig_rl-*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of an empty environment that has the wheel, in a folder outside the tree.

    The dependencies are those of the environment that runs the tests, on a line of a .pth file: the editable
    install there is not seen, because .pth files of such a folder are not read.
    """
    empty, elsewhere = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    scripts = empty / ("Scripts" if os.name == "nt" else "bin")
    install = ["--python", str(scripts / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(PIP + install, check=True)
    (package,) = empty.rglob("site-packages/twig")
    (package.parent / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(command: str, *arguments: str) -> str:
        line = [str(scripts / command), *arguments]
        done = subprocess.run(line, cwd=elsewhere, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.package, call.folder = package, elsewhere
    return call


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


def test_the_installed_package_is_the_one_that_runs(run):
    file, version = run(
        "python", "-c", "import twig; print(twig.__file__, twig.__version__, sep='\\n')"
    ).split("\n")[:2]
    assert Path(file) == run.package / "__init__.py"
    assert version in next(run.package.parent.glob("twig_rl-*.dist-info")).name


def test_quickstart_trains_from_the_wheel(run):
    """Its recipe, embedded model, page of the report and model card all come from the wheel."""
    settings = ["train.max_steps=2", "eval.limit=20", "log.progress=quiet"]
    run("twig", "train", "quickstart", *settings, "--output", "quickstart")
    summary = json.loads((run.folder / "quickstart" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    assert (run.folder / "quickstart" / "report.html").is_file()
    run("twig", "export", "quickstart", "--output", "adapter")
    assert "tiny-arithmetic" in (run.folder / "adapter" / "README.md").read_text()
