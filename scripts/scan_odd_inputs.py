"""Checks odd settings and odd config.json files: refused in one line, or taken with the right numbers.

    python scripts/scan_odd_inputs.py                 # seeds 0 to 1999 of each, minutes
    python scripts/scan_odd_inputs.py --seeds 100
    python scripts/scan_odd_inputs.py --first 1234 --seeds 1

`tests/odd_inputs.py` makes them and says what must hold. Prints how many ended in which way, and the
seeds that failed; the exit status is 1 if one did.
"""

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import odd_inputs

FIRST, SEEDS = 0, 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=FIRST)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.first, given.first + given.seeds):
            for name, check in {
                "settings": lambda seed=seed: odd_inputs.check_settings(seed),
                "config": lambda seed=seed: odd_inputs.check_config(seed, Path(folder)),
            }.items():
                try:
                    outcomes[check()] += 1
                except Exception:
                    outcomes[f"{name} FAILED"] += 1
                    print(f"{name} of seed {seed}:\n{traceback.format_exc()}", flush=True)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6}  {outcome}")
    return int(any("FAILED" in outcome for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
