"""What scripts/setup.py decides, with a faked machine: nothing is installed and no network is touched."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "setup.py"
PLATFORMS = ["linux", "darwin", "win32"]


def _load():
    spec = importlib.util.spec_from_file_location("twig_setup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load()


@pytest.fixture
def clone(tmp_path):
    """A folder with the two files that an install reads."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.0.0\ntorch==2.13.0\n")
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """A machine with a fitting Python, room, and a pip that works; it records the commands that would run."""
    fake = SimpleNamespace(commands=[], free=100e9, torch=None, failing="nothing fails", interrupted=False)

    def call(command, cwd):
        fake.commands.append(command)
        if "venv" in command:
            python = setup.venv_python(Path(cwd), sys.platform)
            python.parent.mkdir(parents=True)
            python.touch()
        if fake.failing in command and fake.interrupted:
            raise KeyboardInterrupt
        return int(fake.failing in command)

    monkeypatch.setattr(setup.subprocess, "call", call)
    monkeypatch.setattr(setup, "candidates", lambda platform: [["good-python"]])
    monkeypatch.setattr(setup, "probe", lambda command: ((3, 12), True, True))
    monkeypatch.setattr(setup, "torch_version", lambda python: fake.torch)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=fake.free))
    return fake


def _refusal(function, *arguments):
    """The one line with which a call refuses."""
    with pytest.raises(setup.Missing) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


# What a machine lacks


def test_parses_under_a_python_that_is_too_old_to_run_twig():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize(
    "platform, cure",
    [
        ("linux", "sudo apt install python3.11 python3.11-venv"),
        ("darwin", "brew install python@3.12"),
        ("win32", "winget install Python.Python.3.12"),
    ],
)
def test_old_or_absent_python_gets_the_command_that_installs_one(platform, cure):
    pythons = {"a": ((3, 8), True, True), "b": ((3, 10), True, True), "c": None}
    line = _refusal(setup.find_python, [["a"], ["b"], ["c"]], lambda command: pythons[command[0]], platform)
    assert "3.10" in line and "3.11 or newer" in line and line.endswith(cure)
    line = _refusal(setup.find_python, [["c"]], lambda command: None, platform)
    assert "no Python was found" in line and line.endswith(cure)


@pytest.mark.parametrize(
    "platform, cure",
    [
        ("linux", "sudo apt install python3.12-venv"),
        ("darwin", "brew install python@3.12"),
        ("win32", "winget install Python.Python.3.12"),
    ],
)
def test_python_without_its_venv_module_gets_the_command_that_adds_it(platform, cure):
    line = _refusal(setup.find_python, [["a"]], lambda command: ((3, 12), False, True), platform)
    assert "venv" in line and line.endswith(cure)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_32_bit_python_is_refused(platform):
    line = _refusal(setup.find_python, [["a"]], lambda command: ((3, 12), True, False), platform)
    assert "64-bit" in line and line.endswith(setup.python_cure(platform))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_first_python_that_fits_is_taken(platform):
    pythons = {
        "absent": None,
        "old": ((3, 9), True, True),
        "bare": ((3, 13), False, True),
        "good": ((3, 11), True, True),
        "later": ((3, 13), True, True),
    }
    found = setup.find_python([[name] for name in pythons], lambda command: pythons[command[0]], platform)
    assert found == ["good"]


def test_probe_reads_a_real_python_and_survives_what_is_none():
    version, _, is_64_bit = setup.probe([sys.executable])
    assert version == sys.version_info[:2]
    assert is_64_bit == (sys.maxsize > 2**32)
    assert setup.probe(["/no/such/python"]) is None
    assert setup.probe([sys.executable, "-c", "raise SystemExit(1)"]) is None


@pytest.mark.parametrize(
    "platform, torch, need",
    [("linux", None, 6.0), ("darwin", None, 3.0), ("win32", None, 3.0), ("linux", "2.13.0+cpu", 1.5)],
)
def test_too_little_disk_names_what_is_needed_and_a_cure(platform, torch, need):
    setup.check_disk(need, torch, platform)
    line = _refusal(setup.check_disk, need - 0.1, torch, platform)
    assert f"needs {need:.1f} GB" in line and f"{need - 0.1:.1f} are free" in line
    assert {"linux": "apt clean", "darwin": "brew cleanup", "win32": "cleanmgr"}[platform] in line
    assert (setup.TORCH_PAGE in line) == (platform == "linux" and torch is None)


# Installing once


def test_install_makes_the_environment_once_and_the_stamp_keeps_later_calls_away(clone, machine):
    setup.install(clone, sys.platform)
    make, pip = machine.commands
    assert make[:3] == ["good-python", "-m", "venv"]
    assert pip[0] == str(setup.venv_python(clone, sys.platform)) and pip[1:4] == ["-m", "pip", "install"]
    assert ".[dev]" in pip and pip[-2:] == ["-c", str(clone / "constraints.txt")]
    setup.install(clone, sys.platform)
    assert len(machine.commands) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_install_repeats_when_the_packages_change(name, clone, machine):
    setup.install(clone, sys.platform)
    with open(clone / name, "a") as file:
        file.write("# changed\n")
    setup.install(clone, sys.platform)
    # The environment stays; only pip runs again.
    assert [command[2] for command in machine.commands] == ["venv", "pip", "pip"]


def test_install_repeats_when_the_environment_is_gone_or_the_clone_has_moved(clone, machine, tmp_path):
    setup.install(clone, sys.platform)
    setup.venv_python(clone, sys.platform).unlink()
    assert not setup.is_installed(clone, sys.platform)
    setup.venv_python(clone, sys.platform).touch()
    assert setup.is_installed(clone, sys.platform)
    moved = tmp_path / "moved"
    shutil.copytree(clone, moved, ignore=shutil.ignore_patterns("moved"))
    assert not setup.is_installed(moved, sys.platform)


def test_only_docs_installs_what_builds_the_documentation_and_once(clone, machine, monkeypatch):
    monkeypatch.setattr(setup, "ROOT", clone)
    monkeypatch.setattr(setup, "hand_over", lambda command, platform: 0)
    assert setup.main(["test"], sys.platform, {}) == setup.main(["docs"], sys.platform, {}) == 0
    extras = [word for command in machine.commands for word in command if word.startswith(".[")]
    assert extras == [".[dev]", ".[docs]"]
    assert machine.commands[-1][-2:] == ["-c", str(clone / "constraints.txt")]
    setup.main(["docs"], sys.platform, {})
    assert len(machine.commands) == 3
    (clone / "constraints.txt").write_text("numpy==2.1.0\n")
    setup.main(["docs"], sys.platform, {})
    assert [word for word in machine.commands[-1] if word.startswith(".[")] == [".[docs]"]
    machine.failing = ".[docs]"
    (clone / "constraints.txt").write_text("numpy==2.2.0\n")
    assert setup.main(["docs"], sys.platform, {}) == 2
    assert setup.is_installed(clone, sys.platform) and not setup.is_installed(clone, sys.platform, "docs")


@pytest.mark.parametrize("step", ["venv", "pip"])
def test_failed_install_leaves_no_stamp(step, clone, machine):
    machine.failing = step
    assert "could not" in _refusal(setup.install, clone, sys.platform)
    assert not setup.is_installed(clone, sys.platform)


@pytest.mark.parametrize("interrupted", [False, True])
def test_half_an_environment_is_removed(interrupted, clone, machine):
    machine.failing, machine.interrupted = "venv", interrupted
    with pytest.raises(KeyboardInterrupt if interrupted else setup.Missing):
        setup.install(clone, sys.platform)
    assert not (clone / ".venv").exists()


def test_an_interrupt_says_how_to_go_on(clone, machine, monkeypatch, capsys):
    monkeypatch.setattr(setup, "ROOT", clone)
    machine.failing, machine.interrupted = "pip", True
    assert setup.main(["quickstart"], sys.platform, {}) == 130
    expected = f"setup: stopped; to go on, run: {setup.typed('quickstart', sys.platform)}\n"
    assert capsys.readouterr().err == expected


def test_nothing_is_made_where_the_disk_is_full(clone, machine):
    machine.free = 1e9
    _refusal(setup.install, clone, sys.platform)
    assert machine.commands == [] and not (clone / ".venv").exists()


@pytest.mark.parametrize(
    "torch, pinned, kept",
    [
        (None, "torch==2.13.0", False),
        ("2.13.0", "torch==2.13.0", False),
        ("2.13.0+cpu", "torch==2.13.0", False),
        ("2.14.1+cu130", "torch==2.14.1+cu130", True),
    ],
)
def test_a_torch_that_is_there_already_is_kept(torch, pinned, kept, clone):
    (clone / ".venv").mkdir()
    file = setup.constraints_file(clone, torch)
    assert file.read_text().splitlines() == ["numpy==2.0.0", pinned]
    assert (file != clone / "constraints.txt") == kept


# Running a target


def _command(target, words, root, environ=None, platform="linux"):
    python, *rest = setup.target_command(target, words, root, platform, environ or {})
    assert python == str(setup.venv_python(root, platform))
    return rest


def _run_folder(root):
    folder = root / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "environment.json").write_text("{}")
    return folder


QUICKSTART = ["-m", "twig", "train", "quickstart", "--output", setup.QUICKSTART_RUN]


def test_words_after_the_target_go_to_its_command(tmp_path):
    tests = ["-m", "pytest", "-n", "logical", "--maxprocesses", "8", "--dist", "loadfile"]
    assert _command("test", ["-k", "trie"], tmp_path) == [*tests, "-k", "trie"]
    assert _command("docs", ["-d", "pages"], tmp_path) == ["-m", "mkdocs", "build", "--strict", "-d", "pages"]
    assert _command("bench", [], tmp_path) == [str(tmp_path / "benchmarks" / "run.py")]
    assert _command("test-slow", ["-x"], tmp_path) == [*tests, "-m", "slow", "-x"]
    assert _command("quickstart", ["train.seed=1"], tmp_path) == [*QUICKSTART, "train.seed=1"]


def test_quickstart_starts_and_then_goes_on(tmp_path):
    assert _command("quickstart", [], tmp_path) == QUICKSTART
    folder = _run_folder(tmp_path)
    assert _command("quickstart", [], tmp_path) == [*QUICKSTART, "--resume"]
    assert _command("quickstart", [], tmp_path, {"FRESH": "0"}) == [*QUICKSTART, "--resume"]
    assert folder.exists()


def test_fresh_removes_the_run_and_starts_over(tmp_path):
    assert _command("quickstart", [], tmp_path, {"FRESH": "1"}) == QUICKSTART
    folder = _run_folder(tmp_path)
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    assert _command("quickstart", [], tmp_path, {"FRESH": "1"}) == QUICKSTART
    assert not folder.exists() and other.exists()


def test_fresh_deletes_only_runs(tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    line = _refusal(setup.target_command, "quickstart", [], tmp_path, "linux", {"FRESH": "1"})
    assert str(folder) in line and "does not look like a run" in line
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="making a link needs rights on Windows")
def test_fresh_does_not_follow_a_link(tmp_path):
    folder = _run_folder(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(folder)
    _refusal(setup.target_command, "quickstart", [], tmp_path, "linux", {"FRESH": "1"})
    assert (folder / "config.yaml").exists()


def test_a_problem_is_one_line_on_stderr_and_status_2(clone, machine, monkeypatch, capsys):
    monkeypatch.setattr(setup, "ROOT", clone)
    monkeypatch.setattr(setup, "probe", lambda command: ((3, 9), True, True))
    assert setup.main(["test"], "linux", {}) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("setup: the newest Python found is 3.9")


@pytest.mark.parametrize("words, status", [([], 2), (["tset"], 2), (["--help"], 0)])
def test_usage_names_the_targets_and_installs_nothing(words, status, machine, capsys):
    assert setup.main(words, "linux", {}) == status
    out = capsys.readouterr().out
    assert all(target in out for target in setup.TARGETS)
    assert machine.commands == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no exec on Windows")
def test_the_target_gets_the_process_and_its_status_comes_back():
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import setup, os; before = os.getpid()\n"
    code += "child = f'import os, sys; sys.exit(130 if os.getpid() == {before} else 1)'\n"
    code += "setup.hand_over([sys.executable, '-c', child], sys.platform)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 130


def test_on_windows_an_interrupt_is_left_to_the_child(monkeypatch):
    ends = iter([KeyboardInterrupt, KeyboardInterrupt, 130])

    def wait():
        end = next(ends)
        if end is KeyboardInterrupt:
            raise end
        return end

    monkeypatch.setattr(setup.subprocess, "Popen", lambda command: SimpleNamespace(wait=wait))
    monkeypatch.chdir(os.getcwd())
    assert setup.hand_over(["twig"], "win32") == 130


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", setup.TARGETS)
def test_make_only_calls_setup(target):
    command = ["make", "-s", target, "PYTHON=echo", "ARGS=-k trie"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"scripts/setup.py {target} -k trie\n"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_without_python_says_how_to_get_one():
    command = ["make", "-s", "test", "PYTHON=no-such-python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sudo apt install python3 python3-venv" in done.stderr.splitlines()[0]
