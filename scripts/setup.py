"""Makes `.venv`, installs Twig once, and runs a target: install, quickstart, test(-slow), bench or docs.

    python3 scripts/setup.py quickstart            (Windows: py scripts/setup.py quickstart)
    python3 scripts/setup.py test -k trie          (words after the target go to its command)

Standard library only, and it parses under old Pythons, so that it can say what a machine lacks: one line
with the cure, and exit status 2. A stamp in `.venv` keeps later calls off the network. It knows nothing of
Twig but its command line and what a run folder looks like.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3", "python")
TARGETS = ("install", "quickstart", "test", "test-slow", "bench", "docs")
# Extra of pyproject.toml -> the file in `.venv` that says that it is installed.
STAMPS = {"dev": "twig-installed", "docs": "twig-docs-installed"}
QUICKSTART_RUN = os.path.join("runs", "quickstart")
TORCH_PAGE = "https://pytorch.org/get-started/locally/"

# Free space that an install needs, in GB: with the CUDA libraries that pip brings on Linux, without them, and
# where torch is there already.
DISK_CUDA, DISK_CPU, DISK_REST = 6.0, 3.0, 1.5

PYTHON_PROBE = """
import importlib.util, sys
can_make = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
print(sys.version_info[0], sys.version_info[1], int(can_make), int(sys.maxsize > 2 ** 32))
"""
TORCH_PROBE = "from importlib.metadata import version; print(version('torch'))"


class Missing(Exception):
    """The machine lacks something: one line that says what, and the exact cure."""


def main(words, platform=sys.platform, environ=os.environ):
    """Installs where needed, then becomes the target's command; returns the exit status."""
    target = words[0] if words else ""
    if target not in TARGETS:
        print("usage: python scripts/setup.py {" + ",".join(TARGETS) + "} [words for the target's command]")
        return 0 if target in ("-h", "--help") else 2
    try:
        install(ROOT, platform)
        if target == "install":
            print("Twig is installed in .venv; next: " + typed("quickstart", platform))
            return 0
        if target == "docs":
            install_docs(ROOT, platform)
        command = target_command(target, words[1:], ROOT, platform, environ)
    except Missing as problem:
        print("setup: " + str(problem), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("setup: stopped; to go on, run: " + typed(target, platform), file=sys.stderr)
        return 130
    return hand_over(command, platform)


def typed(target, platform):
    """The words a person types to run a target on this platform."""
    return ("py scripts/setup.py " if platform == "win32" else "make ") + target


# Finding a Python


def candidates(platform):
    """Commands that may run a Python, the one running this first."""
    commands = [[sys.executable]] if sys.executable else []
    if platform == "win32" and shutil.which("py"):
        commands += [["py", "-3.13"], ["py", "-3.12"], ["py", "-3.11"]]
    return commands + [[path] for path in map(shutil.which, PYTHON_NAMES) if path]


def probe(command):
    """(version, can it make environments, is it 64-bit), or None where `command` does not run a Python."""
    try:
        done = subprocess.run(
            command + ["-c", PYTHON_PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = done.stdout.split()
    if done.returncode != 0 or len(fields) != 4:
        return None
    major, minor, can_make, is_64_bit = (int(field) for field in fields)
    return (major, minor), bool(can_make), bool(is_64_bit)


def find_python(commands, probe, platform):
    """The first command whose Python is new enough, 64-bit and able to make environments; else Missing."""
    newest, lacks_venv, is_32_bit = None, None, False
    for command in commands:
        found = probe(command)
        if found is None:
            continue
        version, can_make, is_64_bit = found
        newest = max(newest or version, version)
        if version < OLDEST_PYTHON:
            continue
        if can_make and is_64_bit:
            return command
        lacks_venv = lacks_venv or (None if can_make else version)
        is_32_bit = is_32_bit or not is_64_bit
    if is_32_bit:
        raise Missing("this Python is 32-bit and PyTorch needs a 64-bit one; run: " + python_cure(platform))
    if lacks_venv:
        what = f"Python {dotted(lacks_venv)} is here without its venv module"
        raise Missing(f"{what}; run: {venv_cure(platform, lacks_venv)}")
    what = f"the newest Python found is {dotted(newest)}" if newest else "no Python was found"
    raise Missing(f"{what} and Twig needs {dotted(OLDEST_PYTHON)} or newer; run: {python_cure(platform)}")


def dotted(version):
    return ".".join(str(number) for number in version)


def python_cure(platform):
    """The command that installs a fitting Python."""
    if platform == "darwin":
        return "brew install python@3.12"
    if platform == "win32":
        return "winget install Python.Python.3.12"
    # The releases of Debian and Ubuntu whose own Python is too old have 3.11 beside it.
    return "sudo apt install python3.11 python3.11-venv"


def venv_cure(platform, version):
    """The command that completes a Python of this version which cannot make environments."""
    if platform in ("darwin", "win32"):
        return python_cure(platform)
    return f"sudo apt install python{dotted(version)}-venv"


# Installing


def venv_python(root, platform):
    """Where the environment's own Python is."""
    return root / ".venv" / ("Scripts/python.exe" if platform == "win32" else "bin/python")


def stamp_text(root):
    """What an install depends on, as a hash: the files that name the packages, and where the sources are."""
    parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join(parts + [str(root).encode()])).hexdigest()


def is_installed(root, platform, extra="dev"):
    """True when the stamp says that these very packages are in `.venv`."""
    stamp = root / ".venv" / STAMPS[extra]
    if not (stamp.exists() and venv_python(root, platform).exists()):
        return False
    return stamp.read_text().strip() == stamp_text(root)


def install(root, platform):
    """Makes `.venv` and installs Twig and its tools into it, unless the stamp says that this was done."""
    if is_installed(root, platform):
        return
    python = venv_python(root, platform)
    base = None if python.exists() else find_python(candidates(platform), probe, platform)
    torch = None if base else torch_version(python)
    check_disk(shutil.disk_usage(str(root)).free / 1e9, torch, platform)
    if base:
        print("Making .venv with " + " ".join(base), flush=True)
        make_environment(base, root)
    if torch is None and is_without_gpu(platform):
        print(cpu_hint(python))
    print("Installing Twig into .venv (once; this takes some minutes)", flush=True)
    pip_install(python, root, "dev", torch, typed("install", platform))


def install_docs(root, platform):
    """Adds what builds the documentation to the environment, unless its stamp says that this was done."""
    if is_installed(root, platform, "docs"):
        return
    python = venv_python(root, platform)
    print("Installing what builds the documentation into .venv (once)", flush=True)
    pip_install(python, root, "docs", torch_version(python), typed("docs", platform))


def pip_install(python, root, extra, torch, again):
    """Installs Twig with an extra into the environment of `python`, and leaves the extra's stamp there."""
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run(
        pip + ["-e", ".[" + extra + "]", "-c", str(constraints_file(root, torch))],
        root,
        "pip could not install the packages; see above. To try again, run: " + again,
    )
    (root / ".venv" / STAMPS[extra]).write_text(stamp_text(root) + "\n")


def make_environment(base, root):
    """Makes `.venv` with the Python that the command `base` runs; all of it or nothing."""
    try:
        make = base + ["-m", "venv", "--clear", str(root / ".venv")]
        run(make, root, "Python could not make .venv; its words are above")
    except BaseException:
        shutil.rmtree(str(root / ".venv"), ignore_errors=True)
        raise


def check_disk(free, torch, platform):
    """Raises Missing where `free` GB are too few; `torch` is the version there already, or None."""
    need = DISK_REST if torch else DISK_CUDA if platform.startswith("linux") else DISK_CPU
    if free >= need:
        return
    line = f"the install needs {need:.1f} GB of disk and {free:.1f} are free; make room, for example with: "
    line += {"darwin": "brew cleanup", "win32": "cleanmgr"}.get(platform, "sudo apt clean")
    if need == DISK_CUDA:
        line += f" (or put the smaller CPU build of torch into .venv first: {TORCH_PAGE})"
    raise Missing(line)


def torch_version(python):
    """The version of torch in the environment, or None."""
    done = subprocess.run([str(python), "-c", TORCH_PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip() or None


def is_without_gpu(platform):
    """True on a Linux machine where nothing shows an NVIDIA GPU."""
    has_gpu = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
    return platform.startswith("linux") and not has_gpu


def cpu_hint(python):
    return (
        "No NVIDIA GPU found. Where pip brings gigabytes of CUDA libraries, the CPU build of torch does "
        f"without: stop here, install it with `{python} -m pip` as {TORCH_PAGE} says, run this again."
    )


def constraints_file(root, torch):
    """The file of pinned versions: `constraints.txt`, or a copy that keeps the `torch` there already."""
    pinned = root / "constraints.txt"
    lines = pinned.read_text().splitlines()
    if torch is None or "torch==" + torch.split("+")[0] in lines:
        return pinned
    print(f"Keeping the torch {torch} that is in .venv (delete .venv for the pinned one)")
    kept = root / ".venv" / "constraints.txt"
    others = [line for line in lines if not line.startswith("torch==")]
    kept.write_text("\n".join(others + ["torch==" + torch]) + "\n")
    return kept


def run(command, root, problem):
    """Runs a command in the project's root; Missing(problem) where it fails."""
    if subprocess.call(command, cwd=str(root)) != 0:
        raise Missing(problem)


# Running a target


def target_command(target, words, root, platform, environ):
    """The command line of a target. For quickstart, it goes on from what is in the run folder."""
    python = str(venv_python(root, platform))
    # A worker for each core; the tests of a file stay together, so that what they share is made once.
    tests = [python, "-m", "pytest", "-n", "logical", "--maxprocesses", "8", "--dist", "loadfile"]
    if target == "test":
        return tests + words
    if target == "test-slow":
        return tests + ["-m", "slow"] + words
    if target == "bench":
        return [python, str(root / "benchmarks" / "run.py")] + words
    if target == "docs":
        return [python, "-m", "mkdocs", "build", "--strict"] + words
    folder = root / QUICKSTART_RUN
    if environ.get("FRESH", "") not in ("", "0"):
        remove_run(folder)
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    return [python, "-m", "twig", "train", "quickstart", "--output", QUICKSTART_RUN] + resume + words


def remove_run(folder):
    """Deletes a run folder, and nothing that does not look like one."""
    if not os.path.lexists(str(folder)):
        return
    is_run = all((folder / name).is_file() for name in ("config.yaml", "environment.json"))
    if folder.is_symlink() or not is_run:
        raise Missing(f"{folder} does not look like a run, so FRESH=1 leaves it alone; move it away yourself")
    shutil.rmtree(str(folder))


def hand_over(command, platform):
    """Runs the target's command in the project's root; its exit status.

    NOTE: the command handles Ctrl-C and SIGTERM itself: it saves and says how to go on. So this process
    becomes the command, or on Windows, where it cannot, waits through the interrupt.
    """
    os.chdir(str(ROOT))
    sys.stdout.flush()
    if platform != "win32":
        os.execv(command[0], command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
