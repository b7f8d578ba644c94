"""Scans every decoder type of transformers and writes what each engine makes of it.

    python scripts/scan_families.py              # all types, a few minutes
    python scripts/scan_families.py llama doge   # only these, printed

Writes tests/fixtures/families.json, from which the table of docs/models.md is made. Each type is exact,
refused with a reason, or not built; the exit status is 1 if one is anything else.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import family_scan  # pyright: ignore[reportMissingImports]  (beside the tests)


def main(kinds: list[str]) -> int:
    """Scans the types, by default all, and returns the exit status."""
    rows = []
    for kind in kinds or family_scan.types():
        rows.append(family_scan.scan(kind))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    if not kinds:
        family_scan.write(rows)
    return int(
        any("FAULT" in result or "off by" in result for row in rows for result in (row.trie, row.plain))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
