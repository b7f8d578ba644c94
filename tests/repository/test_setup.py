"""`make` and scripts/setup.py on faked machines, whose only Python writes down the commands that it gets."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("make", "sh", "cksum", "touch", "mkdir", "cp", "rm")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="a machine without make")

# Runs scripts/setup.py for real, with FAKE in effect; makes no environment and installs nothing.
PYTHON = """#!/bin/sh
case "$1" in
scripts/setup.py) exec PYTHON -c "import importlib.util, pathlib, runpy, shutil, subprocess, sys
sys.argv, sys.executable = sys.argv[1:], '$0'
$FAKE
runpy.run_path('scripts/setup.py', run_name='__main__')" "$@" ;;
-c) echo "['$TORCH']"; exit 0 ;;
esac
echo "$*" >> asked.txt
[ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }
[ "$2" != "${KILLED:-none}" ] || kill -9 $PPID
[ "$2" != "${FAILS:-none}" ]
"""
ROOMY = "shutil.disk_usage = lambda path: type('Usage', (), {'free': 100e9})"


class Machine:
    """A clone of the project's set-up on a machine whose only Python is the fake one."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.path = folder / "a clone", folder / "bin"
        (self.clone / "scripts").mkdir(parents=True)
        for name in ("Makefile", "scripts/setup.py"):
            shutil.copy(ROOT / name, self.clone / name)
        (self.clone / "pyproject.toml").write_text("[project]\n")
        (self.clone / "constraints.txt").write_text("numpy==2.0.0\ntorch==2.13.0\n")
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))
        self.add("python3")

    def add(self, name: str) -> None:
        """Puts a fake Python on the PATH."""
        (self.path / name).write_text(PYTHON.replace("PYTHON", sys.executable))
        (self.path / name).chmod(0o755)

    def make(self, *arguments: str, fake: str = ROOMY, **environ: str) -> subprocess.CompletedProcess:
        environ = {"PATH": str(self.path), "FAKE": fake, "LC_ALL": "C", **environ}
        return subprocess.run(
            [self.path / "make", *arguments], cwd=self.clone, env=environ, capture_output=True, text=True
        )

    def refusal(self, fake: str, **environ: str) -> str:
        """The one line of a machine that lacks something, on which nothing was made."""
        done = self.make("install", fake=f"{ROOMY}\n{fake}", **environ)
        assert done.returncode == 2 and not (self.clone / ".venv").exists(), done.stdout
        line, *rest = done.stderr.splitlines()
        assert line.startswith("setup: ") and all(each.startswith("make: ***") for each in rest), done.stderr
        return line

    @property
    def asked(self) -> list[str]:
        """The commands that the fake Pythons got so far; of an install, only what is installed."""
        file = self.clone / "asked.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix("-m pip install --disable-pip-version-check -q ") for line in lines]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


VENV = "-m venv --clear {}/.venv"
DEV, DOCS, LLAMA = (f"-e .[{extra}] -c constraints.txt" for extra in ("dev", "docs", "llama"))

# What a machine lacks


def test_an_old_python_can_read_the_script():
    ast.parse((ROOT / "scripts" / "setup.py").read_text(), feature_version=(3, 6))


OLD = "sys.version_info = (3, 9, 2, 'final', 0)"
INSTALL = {
    "linux": "sudo apt install python3.11 python3.11-venv",
    "darwin": "brew install python@3.12",
    "win32": "winget install Python.Python.3.12",
}


def test_an_old_python_names_the_newer_one_beside_it(machine):
    machine.add("python3.12")
    line = machine.refusal(OLD)
    assert "3.9" in line and "3.11" in line and line.endswith("make install PYTHON=python3.12")
    assert machine.make("install", "PYTHON=python3.12").returncode == 0


@pytest.mark.parametrize("platform", INSTALL)
def test_an_old_python_alone_gets_the_command_that_installs_one(platform, machine):
    line = machine.refusal(f"{OLD}; sys.platform = {platform!r}")
    assert "3.9" in line and line.endswith(INSTALL[platform])


def test_a_32_bit_python_is_refused(machine):
    line = machine.refusal("sys.maxsize = 2**31 - 1")
    assert "32-bit" in line and line.endswith(INSTALL["linux"])


@pytest.mark.parametrize("platform", INSTALL)
def test_no_venv_module_gets_the_command_that_adds_it(platform, machine):
    cure = "sudo apt install python3.11-venv" if platform == "linux" else INSTALL[platform]
    missing = "sys.modules['ensurepip'] = None; sys.version_info = (3, 11, 2, 'final', 0)"
    line = machine.refusal(f"{missing}; sys.platform = {platform!r}")
    assert "venv" in line and line.endswith(cure)


@pytest.mark.parametrize(("platform", "need"), [("linux", 6.0), ("darwin", 3.0), ("win32", 3.0)])
def test_too_little_disk_is_seen_before_anything_is_made(platform, need, machine):
    free = "shutil.disk_usage = lambda path: type('Usage', (), {{'free': {:.0f}}}); sys.platform = {!r}"
    line = machine.refusal(free.format((need - 0.1) * 1e9, platform))
    assert f"{need} GB" in line and f"{need - 0.1:.1f} GB" in line
    assert ("pytorch.org" in line) == (platform == "linux")
    assert machine.make("install", fake=free.format(need * 1e9, platform)).returncode == 0


def test_a_torch_that_is_there_needs_no_room(machine):
    assert machine.make("install", FAILS="pip").returncode == 2
    free = "shutil.disk_usage = lambda path: type('Usage', (), {'free': 1.5e9})"
    assert machine.make("install", fake=free).returncode == 2
    assert machine.make("install", fake=free, TORCH="2.13.0+cpu").returncode == 0


def test_no_python_at_all_says_how_to_get_one(machine):
    (machine.path / "python3").unlink()
    assert "sudo apt install python3 python3-venv" in machine.refusal("")


# Installing once


def test_it_installs_once_and_then_asks_for_nothing(machine):
    assert machine.make("install").returncode == 0
    assert machine.asked == [VENV.format(machine.clone), DEV]
    (machine.path / "python3").unlink()
    assert machine.make("install").returncode == 0
    assert len(machine.asked) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_installs_again_if_the_packages_change(name, machine):
    machine.make("install")
    (machine.clone / name).write_text("# changed")
    assert machine.make("install").returncode == 0
    assert machine.asked[1:] == [DEV, DEV]


def test_it_installs_again_in_a_folder_that_has_moved(machine):
    machine.make("install")
    machine.clone = machine.clone.rename(machine.clone.with_name("moved"))
    machine.make("install")
    assert machine.asked[1:] == [DEV, DEV]


@pytest.mark.parametrize("how", ["FAILS", "KILLED"])
@pytest.mark.parametrize("step", ["venv", "pip"])
def test_an_install_that_was_broken_off_is_repeated(step, how, machine):
    assert machine.make("install", **{how: step}).returncode == 2
    if step == "venv":
        (machine.clone / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    before = len(machine.asked)
    assert machine.make("install").returncode == 0
    assert machine.asked[before:] == ([VENV.format(machine.clone), DEV] if step == "venv" else [DEV])


def test_another_torch_is_kept(machine):
    machine.make("install", FAILS="pip")
    done = machine.make("install", TORCH="2.14.1+cu130")
    assert done.returncode == 0 and "2.14.1+cu130" in done.stdout
    kept = machine.clone / ".venv" / "constraints.txt"
    assert machine.asked[-1] == f"-e .[dev] -c {kept}" and kept.read_text() == "numpy==2.0.0\n"


def test_only_docs_installs_the_tools_of_the_documentation_and_once(machine):
    machine.make("install")
    machine.make("docs")
    machine.make("docs")
    assert machine.asked[1:] == [DEV, DOCS, "-m mkdocs build --strict", "-m mkdocs build --strict"]


# Targets

TESTS = "-m pytest -n logical --maxprocesses 8 --dist worksteal"
QUICKSTART = "-m twig train quickstart --output runs/quickstart"


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("test", f"{TESTS} -k trie"),
        ("test-gpu", "-m pytest -m gpu -k trie"),
        ("bench", "benchmarks/run.py -k trie"),
        ("quickstart", f"{QUICKSTART} -k trie"),
    ],
)
def test_a_target_installs_and_runs_its_command(target, command, machine):
    assert machine.make(target, "ARGS=-k trie").returncode == 0
    assert machine.asked[1:] == [DEV, command]


def test_slow_tests_have_llama_cpp_once_and_run_without_it_too(machine):
    slow = f"{TESTS} -m slow -k trie"
    machine.make("install")
    assert machine.make("test-slow", "ARGS=-k trie", FAILS="pip").returncode == 0
    assert machine.asked[2:] == [LLAMA, slow]
    for _ in range(2):
        machine.make("test-slow", "ARGS=-k trie")
    assert machine.asked[4:] == [LLAMA, slow, slow]


def test_quickstart_starts_then_resumes_and_starts_over_on_request(machine):
    run = machine.clone / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "notes.txt").touch()
    machine.make("quickstart", FRESH="1")
    assert machine.asked[-1] == QUICKSTART and run.exists(), "only a run is removed"
    (run / "config.yaml").touch()
    machine.make("quickstart")
    assert machine.asked[-1] == f"{QUICKSTART} --resume"
    machine.make("quickstart", FRESH="1")
    assert machine.asked[-1] == QUICKSTART and not run.exists()


def test_lint_stops_at_the_first_check_that_fails(machine):
    machine.make("install")
    (machine.clone / ".venv" / "bin" / "lint-imports").symlink_to(machine.clone / ".venv" / "bin" / "python")
    checks = ["-m ruff check .", "-m ruff format --check .", "-m basedpyright --level error", "--no-cache"]
    assert machine.make("lint").returncode == 0
    assert machine.asked[2:] == checks
    assert machine.make("lint", FAILS="basedpyright").returncode == 2
    assert machine.asked[6:] == checks[:3]
