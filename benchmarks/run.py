"""The CPU set of the benchmarks, and the tables and plots of the pages made from their results.

    python benchmarks/run.py             # `make bench`: under 15 minutes on two cores
    python benchmarks/run.py --tables    # the tables and plots only, from benchmarks/results/

What takes longer, such as `update.py --frontier` and `memory.py`, is run by hand; the tables are made from
what they left.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import tables

HERE = Path(__file__).resolve().parent
UPDATES = ("GRPO", "S-GRPO", "T-SPMO")
# script: its words. Few rounds: for a figure to quote, run the script by itself.
CPU_SET = {
    "sampling.py": ["--rounds", "3", "--repeats", "2"],
    "step.py": ["--rounds", "3", "--steps", "15"],
    "scaling.py": [],
    "update.py": ["--rounds", "1", "--cases", "GRPO", *(f"{name}, layers checkpointed" for name in UPDATES)],
}


def main() -> int:
    """Runs the set and refreshes the page; the exit status is 1 where a script failed."""
    parser = argparse.ArgumentParser(description="Runs the CPU benchmarks and refreshes the pages.")
    parser.add_argument("--tables", action="store_true", help="only refresh the pages")
    options = parser.parse_args()
    failed = []
    began = time.perf_counter()
    for script, words in {} if options.tables else CPU_SET.items():
        print(f"== {script} {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *words]).returncode:
            failed.append(script)
    tables.refresh()
    if not options.tables:
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes; the pages are up to date")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
