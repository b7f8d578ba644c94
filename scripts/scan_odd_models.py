"""Checks odd models with odd adapters against PEFT's own forward: exact, or refused in one line.

    python scripts/scan_odd_models.py                    # seeds 0 to 19 of 100 models each
    python scripts/scan_odd_models.py --first 7 --blocks 1

`tests/odd_models.py` makes them and says what must hold. Prints how many ended in which way after each
block of 100, and the smallest model that failed; the exit status is 1 if one did.
"""

import argparse
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import odd_models
from hypothesis import HealthCheck, given, seed, settings

BLOCKS, EACH = 20, 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    options = parser.parse_args()
    total: Counter[str] = Counter()
    for block in range(options.first, options.first + options.blocks):
        outcomes = _check_block(block)
        total += outcomes
        print(f"block {block}: {dict(sorted(outcomes.items()))}", flush=True)
    print(f"all: {dict(sorted(total.items()))}")
    return int("FAILED" in total)


def _check_block(block: int) -> Counter[str]:
    """Checks the models that follow from one seed; returns how many ended in which way."""
    outcomes: Counter[str] = Counter()

    @seed(block)
    @settings(max_examples=EACH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(**odd_models.MODELS)
    def check(**model: Any) -> None:
        outcomes[odd_models.check(**model)] += 1

    try:
        check()
    except Exception:
        outcomes["FAILED"] += 1
        print(f"block {block}:\n{traceback.format_exc()}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
