"""Runs the studies of docs/study*.md, keeps their raw results, and writes their tables.

    python scripts/study.py run              # study.yaml, two runs at a time, then the tables
    python scripts/study.py run --full       # tuning.yaml first, then all others of the embedded model too
    python scripts/study.py tune             # tuning.yaml, and the best learning rates into the others
    python scripts/study.py tables           # the pages from docs/study/raw alone; nothing is run

    python scripts/study.py run --study svamp-tuning model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-tuning-long model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-layers model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-once model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-tried model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-long model.name=FOLDER task.path=SVAMP
    python scripts/study.py run --study svamp-early model.name=EARLIER task.path=SVAMP
    python scripts/study.py run --study svamp-more model.name=FOLDER task.path=MORE
    python scripts/study.py run --study products model.name=FOLDER
    python scripts/study.py sample --study svamp    # pass@k of the base and of what has finished

Runs of NAME.yaml are made as by `twig compare`. If there is a NAME-trl.yaml, its runs belong to the same
study, and are made with TRL by study_trl.py; `--only trl` makes these alone, `--only twig` the others.
Arguments such as `max_tokens=5000 'seeds=[0]'` change both. An interrupted study is resumed by the same
command. What the tables need of a run, four files and a few columns, is copied to docs/study/raw when it
ends; the tables say how many seeds are there.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import study_words
from study_words import AGAIN, BASE, SAMPLED

from twig.common.errors import UserError
from twig.common.files import FolderLock, put_folder, write_whole
from twig.config.load import load
from twig.evaluation.record import COMPLETIONS, RESULT
from twig.report.credit_map import saved_steps
from twig.runs.folder import RunLog
from twig.runs.reader import is_finished, is_run, read_metrics, read_summary
from twig.runtime.machine import environment
from twig.study.plan import Planned, Study, load_study, runs_of
from twig.study.runner import StudyProgress, changed_since, folder_of, run_all
from twig.study.tables import Result, compare_runs, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
# The studies whose learning rates each of these chooses.
TUNED = {
    "tuning": ("study", "replay", "neighbours", "group-size", "adapter"),
    "by-name-tuning": ("by-name",),
    "svamp-tuning": ("svamp", "svamp-once"),
    "svamp-tuning-long": ("svamp", "svamp-once"),
    "svamp-layers": ("svamp", "svamp-once"),
}
# On the embedded model.
FULL = ("tuning", *TUNED["tuning"], "by-name-tuning", "by-name", "curriculum", "dtype")
# Evaluated on training problems held out.
HELD_OUT = (
    *("svamp-tuning", "svamp-tuning-long", "svamp-layers", "svamp-tried", "svamp-long"),
    *("svamp-by-name", "svamp-curriculum", "svamp-dtype"),
)
REAL = (
    *HELD_OUT,
    "svamp-more",
    "svamp-early",
    "svamp-once",
    "svamp",
    "products",
)  # on a real model, which the arguments name
BESIDE = {"svamp-once": "svamp"}  # which study has the runs without redrawing
KEPT = ("summary.json", "evaluations.jsonl", "environment.json", "config.yaml")
COLUMNS = (
    *("step", "tokens/sampled", "tokens/selected", "time/step", "entropy", "reward", "answers/right"),
    *("frac_reward_zero_std", "redraw/groups", "completions/mean_length"),
    *("sampling/logp_gap", "curriculum/passed_over"),
)
# A table that some studies have beside: for each heading a column of the steps, and what is made of a run's.
FURTHER: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {
    "dtype": {
        "seconds a step, median": ("time/step", np.median),
        "largest gap between sampling and update, nats": ("sampling/logp_gap", np.max),
    },
    "curriculum": {
        "groups without signal": ("frac_reward_zero_std", np.mean),
        "turns passed over": ("curriculum/passed_over", np.sum),
    },
}
DIGITS = 6  # of a number in what is kept of the metrics
RATE = "train.learning_rate="


def main(argv: list[str] | None = None) -> int:
    """Runs the action; returns the exit status of the first command that failed, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "tune", "sample", "tables"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as twig compare takes them")
    parser.add_argument("--full", action="store_true", help="every study of the embedded model")
    parser.add_argument("--study", choices=(*FULL, *REAL), help="this one alone")
    parser.add_argument("--only", choices=("twig", "trl"), help="make the runs of one of them alone")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers that sample draws (8)")
    parser.add_argument(
        "--work", type=Path, default=Path("studies"), metavar="DIR", help="run folders (studies)"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, metavar="DIR", help="where study.md and study/ are"
    )
    options = parser.parse_intermixed_args(argv)
    status = 0
    if options.action != "tables":
        own = options.study or ("tuning" if options.action == "tune" else "study")
        for name in FULL if options.full else (own,):
            if options.action == "sample":
                status = sample(name, options)
            else:
                status = run(name, options)
                if keep(name, options) and name in TUNED:
                    put_rates(options.docs, name)
            if status:
                break
    for page in [options.docs.parent / "README.md", *sorted(options.docs.glob("study*.md"))]:
        if page.is_file():
            write_tables(page, options.docs)
    return status


# ---- running ---------------------------------------------------------------------------------------------


def plan(docs: Path, name: str, overrides: list[str]) -> tuple[list[Planned], list[Planned]]:
    """Returns the runs of a study that Twig makes, and those that TRL makes."""
    files = (docs / "study" / f"{name}.yaml", docs / "study" / f"{name}-trl.yaml")
    ours, theirs = (runs_of(load_study(f, overrides), f.parent) if f.is_file() else [] for f in files)
    return ours, theirs


def given(name: str, overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that a study runs with.

    Of those in HELD_OUT, `task.path=FOLDER` becomes the file of training problems in it: without others, some
    of them are held out, and the test problems choose nothing. Raises UserError if there is no such file.
    """
    if name not in HELD_OUT:
        return list(overrides)
    key = "task.path="
    path = Path(next((each.removeprefix(key) for each in overrides if each.startswith(key)), ""))
    file = path / "train.jsonl" if path.is_dir() else path
    if not file.is_file():
        problem = "it is evaluated on problems held out of SVAMP's training problems, so these are needed"
        raise UserError("task.path", problem, "Pass task.path=FOLDER with train.jsonl, or a file of them")
    return [each for each in overrides if not each.startswith(key)] + [f"{key}{file}"]


class Keeping(StudyProgress):
    """Prints which runs begin and end, and keeps what has finished."""

    def __init__(self, name: str, runs: Sequence[Planned], options: argparse.Namespace) -> None:
        self.name, self.options, self.runs = name, options, {run.name: run for run in runs}

    def begun(self, name: str) -> None:
        print(f"{name}: begun", flush=True)

    def ended(self, name: str, result: str) -> None:
        print(f"{name}: {result}", flush=True)
        if is_finished(read_summary(folder_of(self.options.work / self.name, self.runs[name]))):
            keep_run(self.name, self.runs[name], self.options)


def wait_for_others(study: Path, runs: Sequence[Planned]) -> None:
    """Waits for runs that a study left when it was killed: they have processes of their own, which go on."""
    for planned in runs:
        folder = folder_of(study, planned)
        if not is_run(folder) or _is_done(study, planned):
            continue
        lock = FolderLock(folder)
        if not lock.take():
            print(f"{planned.name}: waiting, for another process is training it", flush=True)
            while not lock.take():
                time.sleep(1)
        lock.release()


def run(name: str, options: argparse.Namespace) -> int:
    """Makes the runs of one study; returns 130 if it was stopped, 2 if a run failed, or 0."""
    study = options.work / name
    ours, theirs = plan(options.docs, name, given(name, options.overrides))
    if options.only != "trl":
        wait_for_others(study, ours)
        outcome = run_all(ours, study, options.jobs, Keeping(name, ours, options))
        for each, reason in outcome.failed.items():
            print(f"{each}: failed: {reason}")
        if outcome.stopped or outcome.failed:
            return 130 if outcome.stopped else 2
    if options.only == "twig":
        return 0
    return in_parallel([lambda planned=each: run_trl(planned, study) for each in theirs], options.jobs)


def in_parallel(tasks: Sequence[Any], jobs: int) -> int:
    """Calls functions, `jobs` at a time; returns the largest of what they return, or 0."""
    pool = ThreadPoolExecutor(jobs)
    try:
        return max(pool.map(lambda task: task(), tasks), default=0)
    finally:
        pool.shutdown(cancel_futures=True)


def run_trl(planned: Planned, study: Path) -> int:
    """Makes one run with TRL unless it is finished; returns the exit status."""
    folder = folder_of(study, planned)
    if not is_run(folder):
        RunLog.create(folder, planned.settings).close()
    elif load(str(folder)).flat() != planned.settings.flat():
        raise UserError(str(folder), "began with other settings", "Pass another --work")
    if is_finished(read_summary(folder)):
        return 0
    command = [sys.executable, str(Path(__file__).with_name("study_trl.py")), str(folder)]
    return logged(command, study, planned.name)


def logged(command: list[str], study: Path, name: str) -> int:
    """Runs a command with its output in the log `name` of a study; returns the exit status."""
    log = study / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        status = subprocess.run(command, stdout=file, stderr=file).returncode
    print(f"{name}: {f'failed, see {log}' if status else 'finished'}", flush=True)
    return status


def sample(name: str, options: argparse.Namespace) -> int:
    """Answers the problems several times, with the base and with each finished run's adapter.

    Returns the largest exit status. What has been answered is not answered again.
    """
    study = options.work / name
    runs = [
        each for each in plan(options.docs, name, given(name, options.overrides))[0] if _is_done(study, each)
    ]
    tasks = []
    for place, planned in enumerate([*runs[:1], *runs]):
        own, extra = (planned.name, []) if place else (BASE, ["model.adapter=null"])
        output = study / SAMPLED / own
        if not (output / RESULT).is_file():
            command = [sys.executable, "-m", "twig", "eval", str(folder_of(study, planned)), *extra]
            command += ["--samples", str(options.samples), "--output", str(output)]
            tasks.append(lambda command=command, own=own: logged(command, study, f"{own}-{SAMPLED}"))
    status = in_parallel(tasks, options.jobs)
    for own in [*([BASE] if runs else []), *(planned.name for planned in runs)]:
        if (study / SAMPLED / own / RESULT).is_file():
            keep_sampled(name, own, options)
    return status


def _is_done(study: Path, planned: Planned) -> bool:
    return is_finished(read_summary(folder_of(study, planned)))


# ---- raw results -----------------------------------------------------------------------------------------


def keep(name: str, options: argparse.Namespace) -> bool:
    """Keeps every finished run of a study, and nothing else of it; returns whether all of them are there."""
    raw, everything = options.docs / "study" / "raw" / name, recorded(name, options)
    ours, theirs = plan(options.docs, name, given(name, options.overrides))
    for planned in ours + theirs:
        if _is_done(options.work / name, planned):
            keep_run(name, planned, options)
    planned_now = [each for part in plan(options.docs, name, everything) for each in part]
    names = {each.name for each in planned_now}
    for folder in (raw / "runs").glob("*"):
        if folder.name not in names:
            print(f"{name}: {folder.name} is not in the study any more; removed what was kept of it")
            shutil.rmtree(folder)
            (raw / SAMPLED / f"{folder.name}.json").unlink(missing_ok=True)
    missing = [each.name for each in planned_now if not is_kept(raw, each)]
    if missing:
        print(f"{name}: {len(missing)} of {len(planned_now)} runs are missing, such as {missing[0]}")
    return not missing


def keep_run(name: str, planned: Planned, options: argparse.Namespace) -> None:
    """Copies what the tables need of a finished run, whole or not at all, and what command it was."""
    source, raw = folder_of(options.work / name, planned), options.docs / "study" / "raw" / name
    target = folder_of(raw, planned)
    draft = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in KEPT:
        text = (source / file).read_text(encoding="utf-8")
        (draft / file).write_text(_without_folders(text, given(name, options.overrides)), encoding="utf-8")
    rows = [{k: _short(row[k]) for k in COLUMNS if k in row} for row in read_metrics(source)]
    if name in REAL and saved_steps(source):
        (draft / study_words.CREDIT).write_text(json.dumps(study_words.credit_of(source)), encoding="utf-8")
    lines = [json.dumps(row) for row in rows if "tokens/sampled" in row]
    (draft / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if read_summary(draft) != read_summary(target):
        (raw / SAMPLED / f"{planned.name}.json").unlink(missing_ok=True)  # of another run of that name
    put_folder(draft, target)
    _keep_record(name, options)


def _keep_record(name: str, options: argparse.Namespace) -> None:
    """Writes by which command, where and with which versions a study was run."""
    machine, overrides = environment(), recorded(name, options)
    theirs = plan(options.docs, name, overrides)[1]
    summaries = [read_summary(folder_of(options.work / name, each)) for each in theirs]
    words = ["twig", "compare", f"docs/study/{name}.yaml", *overrides, "--jobs", str(options.jobs)]
    record = {
        "command": shlex.join(words),
        "overrides": overrides,
        "trl": next((summary["trl"] for summary in summaries if summary is not None), None),
        "platform": machine["platform"],
        "cpu_count": machine["cpu_count"],
        "versions": machine["versions"],
    }
    write_whole(options.docs / "study" / "raw" / name / "record.json", json.dumps(record, indent=1) + "\n")


def keep_sampled(name: str, own: str, options: argparse.Namespace) -> None:
    """Keeps of an evaluation how many answers to each problem are right, and greedy ones' mistakes."""
    source = options.work / name / SAMPLED / own
    result = json.loads((source / RESULT).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (source / COMPLETIONS).read_text(encoding="utf-8").splitlines()]
    counts = [0] * result["greedy"]["n"]
    for row in rows:
        counts[row["problem"]] += row["sample"] is not None and row["right"]
    mistakes = [
        study_words.RIGHT if row["right"] else study_words.mistake(row["completion"], row["answer"])
        for row in rows
        if row["sample"] is None
    ]
    kept = {
        "problems": result["problems"],
        "samples": result["sampled"]["samples"],
        "temperature": result["settings"]["rollout"]["temperature"],
        "mistakes": "".join(mistakes),
        "right": counts,
    }
    target = options.docs / "study" / "raw" / name / SAMPLED / f"{own}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept) + "\n"
    if own == BASE and not (target.is_file() and target.read_text(encoding="utf-8") == text):
        target.with_name(f"{AGAIN}.json").unlink(missing_ok=True)  # perhaps of another model
    write_whole(target, text)


def recorded(name: str, options: argparse.Namespace) -> list[str]:
    """Returns the overrides by which the kept runs are known: those that only choose among them are not."""
    overrides = given(name, options.overrides)
    overrides = [each for each in overrides if each.partition("=")[0] not in ("seeds", "variants")]
    return [_without_folders(each, overrides) for each in overrides]


def _without_folders(text: str, overrides: Sequence[str]) -> str:
    """Returns a text with the last part of each path of the overrides in its place."""
    paths = {value for value in (each.partition("=")[2] for each in overrides) if "/" in value}
    for path in sorted(paths, key=len, reverse=True):
        if Path(path).exists():  # not an id on the Hub
            text = text.replace(path, Path(path).name)
    return text


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def is_kept(raw: Path, planned: Planned) -> bool:
    """Returns whether a run is kept, and not one of its name with other settings."""
    folder = folder_of(raw, planned)
    return is_finished(read_summary(folder)) and not changed_since(folder, planned)


# ---- tables ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What is kept of a study: runs that have finished, names of those that have not, and its record."""

    study: Study
    results: list[Result]
    missing: list[str]
    record: dict[str, Any]


def read_study(docs: Path, name: str) -> Kept | None:
    """Returns what is kept of a study; None if nothing is."""
    raw = docs / "study" / "raw" / name
    if not (raw / "record.json").is_file():
        return None
    record = json.loads((raw / "record.json").read_text(encoding="utf-8"))
    runs = [each for part in plan(docs, name, record["overrides"]) for each in part]
    there = {each.name: is_kept(raw, each) for each in runs}
    results = [Result(each.variant, each.seed, folder_of(raw, each)) for each in runs if there[each.name]]
    missing = [own for own, kept in there.items() if not kept]
    study = load_study(docs / "study" / f"{name}.yaml", record["overrides"])
    return Kept(study, results, missing, record) if results else None


def best_rates(docs: Path, tuning: str) -> dict[str, tuple[str, float]]:
    """Returns the learning rate of each variant of a tuning with the best area, and that area."""
    kept = read_study(docs, tuning)
    best: dict[str, tuple[str, float]] = {}
    if kept is None:
        return best
    comparison = compare_runs(kept.results, kept.study.max_tokens, kept.study.target)
    for name, variant in comparison["variants"].items():
        own, _, rate = name.rpartition(f", {RATE}")
        if variant["area"] is None:
            raise UserError(f"variant {name}", "it was not evaluated while training", "Set eval.steps")
        best[own] = max(best.get(own, ("", -1.0)), (rate, variant["area"]["value"]), key=lambda pair: pair[1])
    return best


def put_rates(docs: Path, tuning: str) -> None:
    """Writes the best learning rates into the studies that a tuning is for, where they have a rate.

    A variant gets that of the one with its name, or with its name up to the first comma. The grid of
    neighbours.yaml gets two rates, one of them the best of grpo.
    """
    best = best_rates(docs, tuning)
    for own, (rate, area) in best.items():
        print(f"{own}: learning rate {rate}, area {100 * area:.1f} %")
    for path in sorted((docs / "study").glob("*.yaml")):
        if path.stem.removesuffix("-trl") not in TUNED[tuning]:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
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


def write_tables(page: Path, docs: Path) -> None:
    """Writes the tables of every study that was run into a page, between its marks."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- study: ([\w-]+) -->", text):
        kept = read_study(docs, name)
        if kept is not None:
            text = _with_block(text, "study", name, tables(name, kept))
            if f"<!-- words: {name} -->" in text:
                seeds = len(kept.study.seeds)
                beside = read_study(docs, BESIDE[name]) if name in BESIDE else None
                others = beside.results if beside else ()
                block = study_words.tables(docs, name, kept.results, seeds, others)
                text = _with_block(text, "words", name, so_far(kept) + block)
    if told := study_words.supervised(docs):
        text = _with_block(text, "words", "svamp-supervised", told)
    if "<!-- words: svamp-in-short -->" in text and (kept := read_study(docs, "svamp")):
        block = study_words.in_short(kept.results, len(kept.study.seeds))
        text = _with_block(text, "words", "svamp-in-short", block)
    page.write_text(text, encoding="utf-8")


def _with_block(text: str, kind: str, name: str, block: str) -> str:
    """Returns a page with a block in place of what stands between the marks of a kind and a name."""
    mark = f"<!-- {kind}: {name} -->\n"
    return re.sub(
        f"{mark}.*?<!-- /{kind} -->", lambda _: f"{mark}{block}<!-- /{kind} -->", text, flags=re.DOTALL
    )


def tables(name: str, kept: Kept) -> str:
    """Returns how a study was run, and its tables."""
    result = compare_runs(kept.results, kept.study.max_tokens, kept.study.target)
    record = kept.record
    trl = f" and, with TRL {record['trl']}, docs/study/{name}-trl.yaml" if record.get("trl") else ""
    commits = ", ".join(sorted({commit[:12] for commit in result["commits"]}))
    where = f"{record['cpu_count']} processors{processors(kept.results)}"
    how = (
        f"`{record['command']}`{trl}, commit {commits}, on {where}; training "
        f"took {result['seconds'] / 60:.1f} minutes over all runs.{peaks(kept.results)}\n\n"
    )
    text = markdown(result, differences=name not in TUNED, seeds=len(kept.study.seeds))
    return how + so_far(kept) + text + further(name, kept.results)


def processors(results: Sequence[Result]) -> str:
    """Returns the kinds of processors that the runs were made on, as far as they kept them; or nothing."""
    files = [(run.folder / "environment.json").read_text(encoding="utf-8") for run in results]
    names = {json.loads(file).get("processor") for file in files}
    known = sorted(names - {None})
    others = ["others not kept"] if known and None in names else []
    return f" ({'; '.join([*known, *others])})" if known else ""


def peaks(results: Sequence[Result]) -> str:
    """Returns between what shares the peak predicted before a run was off the measured one; or nothing."""
    errors = [study_words.prediction_error(run.summary) for run in results]
    if not (known := [100 * error for error in errors if error is not None]):
        return ""
    span = " to ".join(dict.fromkeys(f"{each:+.1f}" for each in (min(known), max(known))))
    return f" Predicted peaks of memory were {span} % off the measured ones."


def further(name: str, results: Sequence[Result]) -> str:
    """Returns the table that FURTHER has for a study, means over the runs of each variant; or nothing."""
    headings = FURTHER.get(name.removeprefix("svamp-"))
    if headings is None:
        return ""
    rows = [["", *headings], ["---"] * (1 + len(headings))]
    for variant in dict.fromkeys(each.variant for each in results):
        runs = [each.steps for each in results if each.variant == variant]
        figures = [
            np.mean([reduce([row.get(column, 0.0) for row in run]) for run in runs])
            for column, reduce in headings.values()
        ]
        rows.append([variant, *(f"{figure:.3g}" for figure in figures)])
    return "\nMeans over the runs:\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def so_far(kept: Kept) -> str:
    """Returns a line that says how many runs are there, or nothing if all of them are."""
    there = len(kept.results)
    return f"**So far {there} of {there + len(kept.missing)} runs are there.**\n\n" if kept.missing else ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
