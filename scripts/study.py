"""Runs the study of docs/study.md, keeps its raw results, and writes its tables.

    python scripts/study.py run              # study.yaml, two runs at a time, then the tables
    python scripts/study.py run --full       # tuning.yaml first, then all the others too
    python scripts/study.py tune             # tuning.yaml, and the best learning rates into study.yaml
    python scripts/study.py tables           # docs/study.md from docs/study/raw alone; nothing is run

Arguments such as `max_tokens=5000 'seeds=[0]'` are passed on to every `twig compare`. An interrupted study is
resumed. The tables need four files and a few columns of each run folder; these are kept in docs/study/raw.
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


def main(argv: list[str] | None = None) -> int:
    """Runs the action; returns the exit status of the first `twig compare` that failed, or 0."""
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
    options = parser.parse_args(argv)
    if options.action != "tables":
        names = FULL if options.full else ("tuning",) if options.action == "tune" else ("study",)
        for name in names:
            status = run(name, options)
            if status:
                return status
            if name == "tuning":
                put_rates(options.docs, options.overrides)
    write_page(options.docs)
    return 0


def run(name: str, options: argparse.Namespace) -> int:
    """Runs one study and keeps its raw results; returns the exit status of `twig compare`."""
    study, folder = options.docs / "study" / f"{name}.yaml", options.work / name
    shared = [*options.overrides, "--jobs", str(options.jobs)]
    began = time.monotonic()
    status = subprocess.run(
        [sys.executable, "-m", "twig", "compare", str(study), *shared, "--output", str(folder)]
    ).returncode
    if status:
        return status
    machine = environment()
    record = {
        "command": " ".join(["twig", "compare", f"docs/study/{name}.yaml", *shared]),
        "overrides": options.overrides,
        "commit": machine["commit"],
        "seconds": round(time.monotonic() - began, 1),
        "platform": machine["platform"],
        "cpu_count": machine["cpu_count"],
        "versions": machine["versions"],
    }
    keep(folder, options.docs / "study" / "raw" / name, record)
    return 0


def keep(folder: Path, raw: Path, record: dict) -> None:
    """Copies what the tables need from the runs in `folder`."""
    old = json.loads((raw / "record.json").read_text()) if (raw / "record.json").is_file() else {}
    # A study that was resumed took the time of all its parts.
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


def read_study(docs: Path, name: str) -> tuple[dict, dict] | None:
    """Returns the comparison of a study's raw results and its record; None if it was not run."""
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
    comparison, _ = read_study(docs, "tuning")
    best: dict[str, tuple[float, str]] = {}
    for name, variant in comparison["variants"].items():
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
    """Writes the tables of every study that was run into study.md, between its marks."""
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- study: ([\w-]+) -->", text):
        study = read_study(docs, name)
        if study is None:
            continue
        result, record = study
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
