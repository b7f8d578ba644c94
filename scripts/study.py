"""Runs the studies of docs/study*.md, keeps their raw results, and writes their tables.

    python scripts/study.py run              # study.yaml, two runs at a time, then the tables
    python scripts/study.py run --full       # tuning.yaml first, then all the others too
    python scripts/study.py tune             # tuning.yaml, and the best learning rates into the others
    python scripts/study.py tables           # the pages from docs/study/raw alone; nothing is run

Runs of NAME.yaml are made by `twig compare`. If there is a NAME-trl.yaml, its runs belong to the same
study, and are made with TRL by study_trl.py; `--only trl` makes these alone, `--only twig` the others.
Arguments such as `max_tokens=5000 'seeds=[0]'` change both. An interrupted study is resumed. Results are
kept once all runs of a study are there: the tables need four files and a few columns of each run folder, in
docs/study/raw.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twig.common.errors import UserError
from twig.config.load import load
from twig.runs.folder import RunLog
from twig.runs.reader import is_finished, is_run, read_metrics, read_summary
from twig.runtime.machine import environment
from twig.study.plan import Planned, load_study, runs_of
from twig.study.runner import folder_of
from twig.study.tables import Result, compare_runs, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
FULL = ("tuning", "study", "replay", "neighbours", "group-size", "adapter")  # on the embedded model
KEPT = ("summary.json", "evaluations.jsonl", "environment.json", "config.yaml")
COLUMNS = ("step", "tokens/sampled", "time/step", "entropy")
RATE = "train.learning_rate="


def main(argv: list[str] | None = None) -> int:
    """Runs the action; returns the exit status of the first command that failed, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "tune", "tables"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="passed on to twig compare")
    parser.add_argument("--full", action="store_true", help="every study, not only study.yaml")
    parser.add_argument("--study", choices=FULL, help="this one alone")
    parser.add_argument("--only", choices=("twig", "trl"), help="make the runs of one of them alone")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument(
        "--work", type=Path, default=Path("studies"), metavar="DIR", help="run folders (studies)"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, metavar="DIR", help="where study.md and study/ are"
    )
    options = parser.parse_intermixed_args(argv)
    if options.action != "tables":
        own = options.study or ("tuning" if options.action == "tune" else "study")
        for name in FULL if options.full else (own,):
            status = run(name, options)
            if status:
                return status
            if keep(name, options) and name == "tuning":
                put_rates(options.docs)
    for page in sorted(options.docs.glob("study*.md")):
        write_tables(page)
    return 0


def plan(docs: Path, name: str, overrides: list[str]) -> tuple[list[Planned], list[Planned]]:
    """Returns the runs of a study that Twig makes, and those that TRL makes."""
    files = (docs / "study" / f"{name}.yaml", docs / "study" / f"{name}-trl.yaml")
    ours, theirs = (runs_of(load_study(f, overrides), f.parent) if f.is_file() else [] for f in files)
    return ours, theirs


def run(name: str, options: argparse.Namespace) -> int:
    """Makes the runs of one study; returns the exit status of the first command that failed, or 0."""
    folder = options.work / name
    if options.only != "trl":
        study = str(options.docs / "study" / f"{name}.yaml")
        command = [sys.executable, "-m", "twig", "compare", study, *options.overrides]
        command += ["--jobs", str(options.jobs), "--output", str(folder)]
        status = subprocess.run(command).returncode
        if status:
            return status
    if options.only == "twig":
        return 0
    pool = ThreadPoolExecutor(options.jobs)
    try:
        theirs = plan(options.docs, name, options.overrides)[1]
        return max(pool.map(lambda planned: run_trl(planned, folder), theirs), default=0)
    finally:
        pool.shutdown(cancel_futures=True)


def run_trl(planned: Planned, study: Path) -> int:
    """Makes one run with TRL unless it is finished; returns the exit status."""
    folder, log = folder_of(study, planned), study / "logs" / f"{planned.name}.txt"
    if not is_run(folder):
        RunLog.create(folder, planned.settings).close()
    elif load(str(folder)).flat() != planned.settings.flat():
        raise UserError(str(folder), "began with other settings", "Pass another --work")
    if is_finished(read_summary(folder)):
        return 0
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("study_trl.py")), str(folder)]
    with open(log, "ab") as file:
        status = subprocess.run(command, stdout=file, stderr=file).returncode
    print(f"{planned.name}: {f'failed, see {log}' if status else 'finished'}", flush=True)
    return status


def keep(name: str, options: argparse.Namespace) -> bool:
    """Copies what the tables need from the runs of a study; returns whether all of them were there."""
    work, raw = options.work / name, options.docs / "study" / "raw" / name
    ours, theirs = plan(options.docs, name, options.overrides)
    missing = [run.name for run in ours + theirs if not is_finished(read_summary(folder_of(work, run)))]
    if missing:
        print(f"{name}: nothing kept, {len(missing)} runs are missing, such as {missing[0]}")
        return False
    shutil.rmtree(raw, ignore_errors=True)
    for planned in ours + theirs:
        source, target = folder_of(work, planned), folder_of(raw, planned)
        target.mkdir(parents=True)
        for file in KEPT:
            shutil.copyfile(source / file, target / file)
        rows = [{k: row[k] for k in COLUMNS if k in row} for row in read_metrics(source)]
        lines = [json.dumps(row) for row in rows if "tokens/sampled" in row]
        (target / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    machine = environment()
    words = ["twig", "compare", f"docs/study/{name}.yaml", *options.overrides, "--jobs", str(options.jobs)]
    record = {
        "command": " ".join(words),
        "overrides": options.overrides,
        "trl": (read_summary(folder_of(work, theirs[0])) or {})["trl"] if theirs else None,
        "platform": machine["platform"],
        "cpu_count": machine["cpu_count"],
        "versions": machine["versions"],
    }
    (raw / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return True


def read_study(docs: Path, name: str) -> tuple[dict, dict] | None:
    """Returns the comparison of a study's raw results and its record; None if not all of it was run."""
    raw = docs / "study" / "raw" / name
    if not (raw / "record.json").is_file():
        return None
    record = json.loads((raw / "record.json").read_text(encoding="utf-8"))
    ours, theirs = plan(docs, name, record["overrides"])
    results = [Result(run.variant, run.seed, folder_of(raw, run)) for run in ours + theirs]
    missing = [result.folder.name for result in results if not result.summary]
    if missing:
        print(f"{name}: its tables stay as they are, {len(missing)} runs are missing, such as {missing[0]}")
        return None
    study = load_study(docs / "study" / f"{name}.yaml", record["overrides"])
    return compare_runs(results, study.max_tokens, study.target), record


def best_rates(docs: Path) -> dict[str, tuple[str, float]]:
    """Returns the learning rate of each variant of tuning.yaml with the best area, and that area."""
    comparison, _ = read_study(docs, "tuning") or ({"variants": {}}, None)
    best: dict[str, tuple[str, float]] = {}
    for name, variant in comparison["variants"].items():
        own, _, rate = name.rpartition(f", {RATE}")
        if variant["area"] is None:
            raise UserError(f"variant {name}", "it was not evaluated while training", "Set eval.steps")
        best[own] = max(best.get(own, ("", -1.0)), (rate, variant["area"]["value"]), key=lambda pair: pair[1])
    return best


def put_rates(docs: Path) -> None:
    """Writes the best learning rates into the other studies, where they have a rate.

    A variant gets that of the one with its name, or with its name up to the first comma. The grid of
    neighbours.yaml gets two rates, one of them the best of grpo.
    """
    best = best_rates(docs)
    for own, (rate, area) in best.items():
        print(f"{own}: learning rate {rate}, area {100 * area:.1f} %")
    for path in sorted((docs / "study").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.stem.removesuffix("-trl") == "tuning":
            continue
        for i, line in enumerate(lines):
            own = line.strip().partition(":")[0].partition(",")[0]
            if own in best:
                lines[i] = re.sub(rf"{re.escape(RATE)}[0-9.e-]+", f"{RATE}{best[own][0]}", line)
            elif own == "train.learning_rate" and "grpo" in best:
                lines[i] = line.partition(":")[0] + f": [{', '.join(_grid(best['grpo'][0]))}]"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _grid(best: str) -> tuple[str, str]:
    """Returns two learning rates, one of them `best`: 0.002 and 0.004, or half of it and itself."""
    return ("0.002", "0.004") if 0.002 <= float(best) <= 0.004 else (f"{float(best) / 2:g}", best)


def write_tables(page: Path) -> None:
    """Writes the tables of every study that was run into a page, between its marks."""
    docs = page.parent
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- study: ([\w-]+) -->", text):
        study = read_study(docs, name)
        if study is None:
            continue
        result, record = study
        trl = f" and, with TRL {record['trl']}, docs/study/{name}-trl.yaml" if record.get("trl") else ""
        commits = ", ".join(sorted({commit[:12] for commit in result["commits"]}))
        how = (
            f"`{record['command']}`{trl}, commit {commits}, on {record['cpu_count']} processors; training "
            f"took {result['seconds'] / 60:.1f} minutes over all runs.\n\n"
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
