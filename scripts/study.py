"""Runs the study of docs/study.md, keeps its raw results, and writes its tables.

    python scripts/study.py run              # study.yaml, two runs at a time, then the tables
    python scripts/study.py run --full       # tuning.yaml first, then all the others too
    python scripts/study.py tune             # tuning.yaml, and the best learning rates into study.yaml
    python scripts/study.py tables           # docs/study.md from docs/study/raw alone; nothing is run

Words of the form key=value are passed on to every `twig compare` (`max_tokens=5000 'seeds=[0]'`). A study
that was broken off goes on where it stopped. Of each run folder the tables need four files and a few
columns; these are kept in docs/study/raw.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from twig.runs.reader import read_metrics
from twig.runtime.machine import environment
from twig.study.plan import load_study, runs_of
from twig.study.tables import Result, compare_runs, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
FULL = ("tuning", "study", "neighbours", "group-size", "adapter")
KEPT = ("summary.json", "evaluations.jsonl", "environment.json", "config.yaml")
COLUMNS = ("step", "tokens/sampled", "time/step", "entropy")


def main(words: list[str] | None = None) -> int:
    """Does what is asked; the exit status is that of the first `twig compare` that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "tune", "tables"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="passed on to twig compare")
    parser.add_argument("--full", action="store_true", help="every study, not only study.yaml")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument(
        "--work", type=Path, default=Path("studies"), metavar="DIR", help="run folders (studies)"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, metavar="DIR", help="where study.md and study/ are"
    )
    given = parser.parse_args(words)
    if given.action != "tables":
        names = FULL if given.full else ("tuning",) if given.action == "tune" else ("study",)
        for name in names:
            status = run(name, given)
            if status:
                return status
            if name == "tuning":
                put_rates(given.docs, given.overrides)
    write_page(given.docs)
    return 0


def run(name: str, given: argparse.Namespace) -> int:
    """Runs one study and keeps its raw results; returns the exit status of `twig compare`."""
    study, folder = given.docs / "study" / f"{name}.yaml", given.work / name
    words = ["compare", str(study), *given.overrides, "--output", str(folder), "--jobs", str(given.jobs)]
    began = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "twig", *words]).returncode
    if status:
        return status
    relative = [f"docs/study/{name}.yaml", *given.overrides, "--jobs", str(given.jobs)]
    found = environment()
    record = {
        "command": " ".join(["twig", "compare", *relative]),
        "overrides": given.overrides,
        "commit": found["commit"],
        "seconds": round(time.monotonic() - began, 1),
        "platform": found["platform"],
        "cpu_count": found["cpu_count"],
        "versions": found["versions"],
    }
    keep(folder, given.docs / "study" / "raw" / name, record)
    return 0


def keep(folder: Path, raw: Path, record: dict) -> None:
    """Copies what the tables need of the runs in `folder`."""
    old = json.loads((raw / "record.json").read_text()) if (raw / "record.json").is_file() else {}
    # Gone on with: the time is that of all parts together.
    same = [old.get(key) == record[key] for key in ("command", "commit")]
    record["seconds"] += old["seconds"] if all(same) and record["seconds"] < 60 else 0
    shutil.rmtree(raw, ignore_errors=True)
    for source in sorted((folder / "runs").iterdir()):
        target = raw / "runs" / source.name
        target.mkdir(parents=True)
        for name in KEPT:
            shutil.copyfile(source / name, target / name)
        rows = [{k: row[k] for k in COLUMNS if k in row} for row in read_metrics(source)]
        lines = [json.dumps(row) for row in rows if "tokens/sampled" in row]
        (target / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (raw / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def found_of(docs: Path, name: str) -> tuple[dict, dict] | None:
    """What the raw results of a study come to, and how it was run; None where it was not run."""
    raw = docs / "study" / "raw" / name
    if not (raw / "record.json").is_file():
        return None
    record = json.loads((raw / "record.json").read_text(encoding="utf-8"))
    study = load_study(docs / "study" / f"{name}.yaml", record["overrides"])
    runs = runs_of(study, docs / "study")
    results = [Result(each.variant, each.seed, raw / "runs" / each.name) for each in runs]
    return compare_runs(results, study.max_tokens), record


def put_rates(docs: Path, overrides: list[str]) -> None:
    """Writes the learning rate with the best mean accuracy in tuning.yaml into study.yaml, by variant."""
    found, _ = found_of(docs, "tuning")
    best: dict[str, tuple[float, str]] = {}
    for name, variant in found["variants"].items():
        own, _, rate = name.rpartition(", train.learning_rate=")
        best[own] = max(best.get(own, (-1.0, "")), (variant["accuracy"]["value"], rate))
    path = docs / "study" / "study.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if name in best and "train.learning_rate=" in line:
            lines[i] = re.sub(r"train\.learning_rate=[0-9.e-]+", f"train.learning_rate={best[name][1]}", line)
            print(f"{name}: learning rate {best[name][1]}, accuracy {100 * best[name][0]:.1f} %")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_page(docs: Path) -> None:
    """Writes the tables of every study that was run between its marks in study.md."""
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- study: ([\w-]+) -->", text):
        found = found_of(docs, name)
        if found is None:
            continue
        result, record = found
        how = (
            f"`{record['command']}`, commit {(record['commit'] or 'unknown')[:12]}, "
            f"{record['seconds'] / 60:.1f} minutes on {record['cpu_count']} processors; training took "
            f"{result['seconds'] / 60:.1f} minutes over all runs.\n\n"
        )
        block = (
            f"<!-- study: {name} -->\n{how}{markdown(result, differences=name != 'tuning')}<!-- /study -->"
        )
        text = re.sub(
            rf"<!-- study: {name} -->.*?<!-- /study -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
