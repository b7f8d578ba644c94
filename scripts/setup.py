"""Checks the machine, makes `.venv`, and installs Twig with its development tools into it.

    python3 scripts/setup.py            (Windows: py scripts/setup.py; `make install` calls it)
    python3 scripts/setup.py docs       (the tools of the documentation instead)

Anything missing is one line with the command that adds it, and exit status 2. Only the standard library, and
syntax that Python 3.6 reads, so that an old Python gets this line too. It can be run again at any time.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
OLDEST, NEWER = (3, 11), ("python3.13", "python3.12", "python3.11")

# GB of free space that an install needs: torch with CUDA libraries (Linux), without them, torch in place.
DISK_CUDA, DISK_CPU, DISK_REST = 6.0, 3.0, 1.5
TORCH_PAGE = "https://pytorch.org/get-started/locally/"

# Fails unless pip works; prints torch's version.
PROBE = "import pip; from importlib.metadata import distributions as get; "
PROBE += "print([each.version for each in get(name='torch')])"


class Missing(Exception):
    """What the machine lacks, with the command that adds it, as one line."""


def main(extra="dev"):
    """Installs Twig with an extra of pyproject.toml; returns the exit status."""
    try:
        torch = torch_in_venv()
        if torch is None:
            check_python()
        check_disk(torch)
        if torch is None:
            print("Making .venv with " + sys.executable, flush=True)
            run([sys.executable, "-m", "venv", "--clear", str(VENV)], "Python could not make .venv")
        print(f"Installing Twig and its extra {extra} into .venv (once, minutes)", flush=True)
        pip = [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        run(pip + ["-e", f".[{extra}]", "-c", constraints(torch)], "pip could not install the packages")
    except (Missing, KeyboardInterrupt) as problem:
        print(f"setup: {str(problem) or 'stopped; run it again to retry'}", file=sys.stderr)
        return 2 if isinstance(problem, Missing) else 130
    return 0


def torch_in_venv():
    """Returns the version of torch in `.venv`, "" without torch, None if `.venv` is not whole."""
    try:
        done = subprocess.run([VENV_PYTHON, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.decode().strip(" \r\n[']") if done.returncode == 0 else None


def check_python():
    """Raises Missing unless this Python is new enough, 64-bit and able to make environments."""
    version = "{}.{}".format(*sys.version_info[:2])
    elsewhere = {"darwin": "brew install python@3.12", "win32": "winget install Python.Python.3.12"}
    install = elsewhere.get(sys.platform, "sudo apt install python3.11 python3.11-venv")
    if tuple(sys.version_info[:2]) < OLDEST:
        newer = next((name for name in NEWER if shutil.which(name)), None)
        cure = f"make install PYTHON={newer}" if newer else install
        raise Missing(f"Python {version} is too old, Twig needs 3.11 or newer; run: {cure}")
    if sys.maxsize < 2**32:
        raise Missing(f"Python {version} is 32-bit, PyTorch needs a 64-bit one; run: {install}")
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        cure = elsewhere.get(sys.platform, f"sudo apt install python{version}-venv")
        raise Missing(f"Python {version} has no venv module; run: {cure}")


def check_disk(torch):
    """Raises Missing if the disk is too full for the install."""
    need = DISK_REST if torch else DISK_CUDA if sys.platform.startswith("linux") else DISK_CPU
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < need:
        cure = {"darwin": "brew cleanup", "win32": "cleanmgr"}.get(sys.platform, "sudo apt clean")
        cure += f" (or install the CPU build of torch into .venv: {TORCH_PAGE})" if need == DISK_CUDA else ""
        raise Missing(
            f"the install needs {need} GB of disk, {free:.1f} GB are free; make room, such as: {cure}"
        )


def constraints(torch):
    """Returns the file of pinned versions; without torch's if `.venv` has another one, which is kept."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if not torch or "torch==" + torch.split("+")[0] in lines:
        return "constraints.txt"
    print(f"Keeping torch {torch}; delete .venv for the pinned version")
    kept = VENV / "constraints.txt"
    kept.write_text("\n".join(line for line in lines if not line.startswith("torch==")) + "\n")
    return str(kept)


def run(command, problem):
    """Runs a command in the project's root; raises Missing if it fails."""
    if subprocess.call(command, cwd=str(ROOT)) != 0:
        raise Missing(f"{problem}, see above; run it again to retry")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
