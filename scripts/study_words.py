"""Tables of the study on word problems that `twig compare` does not have, and wrong answers to read.

    python scripts/study_words.py alike SVAMP          # which test problems resemble training problems
    python scripts/study_words.py wrong EVALUATION     # twenty wrong greedy answers, one after the other
    python scripts/study_words.py changed BASE EVALUATION    # greedy answers that training changed

SVAMP is a folder with train.jsonl and test.jsonl, BASE and EVALUATION are folders that `twig eval --output`
or `scripts/study.py sample` wrote. A test problem is *alike* if its body (all but the question), numbers
masked, is that of a training problem. The tables are written by `scripts/study.py tables`.
"""

import argparse
import json
import operator
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.common.text import percent
from twig.config.load import load
from twig.evaluation.record import COMPLETIONS
from twig.evaluation.statistics import bootstrap_gap, bootstrap_runs, mcnemar, pass_at_k
from twig.report.credit_map import SavedGroup, read_groups, saved_steps
from twig.study.tables import Result, figure_text, gap_text, seeds_text

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "word_problems"))
from problems import mask  # noqa: E402  # pyright: ignore[reportMissingImports]

ALIKE = Path("study") / "svamp-alike.json"  # in docs
SUPERVISED = Path("study") / "raw" / "svamp-supervised.json"  # in docs
SAMPLED, BASE = "sampled", "base"  # in the raw results of a study
AGAIN = f"{BASE}-again"  # the same sampled once more, on another processor, if it was
NO_TRAINING = "no training"
REDRAW = ", redraw"  # what the name of a variant with redrawing ends with
GIB = 2**30
_ROUNDED = 0.01  # of a result


def main(argv: list[str] | None = None) -> int:
    """Runs the action; the exit status is 2 if something cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("alike", help="write which test problems resemble training problems")
    one.add_argument("svamp", metavar="SVAMP", help="a folder with train.jsonl and test.jsonl")
    one.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="where study/ is")
    one = actions.add_parser("wrong", help="print wrong answers")
    one.add_argument("evaluation", type=Path, metavar="EVALUATION", help="a folder with completions.jsonl")
    one.add_argument("--number", type=int, default=20, metavar="N", help="how many (20)")
    one.add_argument("--seed", type=int, default=0, metavar="N", help="which ones are drawn (0)")
    one = actions.add_parser("changed", help="print how training changed the answers")
    one.add_argument("base", type=Path, metavar="BASE", help="that of the model before training")
    one.add_argument("evaluation", type=Path, metavar="EVALUATION", help="that after training")
    one.add_argument("--number", type=int, default=3, metavar="N", help="how many (3)")
    options = parser.parse_args(argv)
    try:
        if options.action == "alike":
            write_alike(options.svamp, options.docs)
        elif options.action == "changed":
            print_changed(options.base, options.evaluation, options.number)
        else:
            print_wrong(options.evaluation, options.number, options.seed)
    except UserError as error:
        print(f"study_words: {error}", file=sys.stderr)
        return 2
    return 0


# ---- which problems are alike ------------------------------------------------------------------------------


def alike(train: Sequence[str], test: Sequence[str]) -> list[bool]:
    """Returns which bodies of test problems have the wording of one of the training problems.

    >>> alike(["Tom has 3 hens."], ["Tom has 17 hens.", "Ann has 3 hens."])
    [True, False]
    """
    seen = {mask(body) for body in train}
    return [mask(body) in seen for body in test]


def write_alike(svamp: str, docs: Path) -> None:
    """Writes which of SVAMP's test problems are alike, with the checksum of these problems."""
    from twig.evaluation.evaluate import problems_checksum
    from twig.tasks.load import load_task

    task = load_task(load("svamp-smollm2-135m", [f"task.path={svamp}"]))
    bodies = [[str(example.columns["Body"]) for example in split] for split in (task.train, task.eval)]
    flags = alike(*bodies)
    digits = "".join("1" if flag else "0" for flag in flags)
    kept = {"problems": problems_checksum(task.eval), "number": sum(flags), "alike": digits}
    write_whole(docs / ALIKE, json.dumps(kept) + "\n")
    print(f"{sum(flags)} of {len(flags)} test problems have the body of a training problem")


def unlike_problems(docs: Path, results: Sequence[Result]) -> np.ndarray:
    """Returns which problems are not alike, bool [problems]; raises UserError if others were answered."""
    kept = json.loads((docs / ALIKE).read_text(encoding="utf-8"))
    answered = {row["problems"] for result in results for row in result.evaluations}
    if answered != {kept["problems"]}:
        problem = "lists other problems than those that the runs answered"
        raise UserError(str(docs / ALIKE), problem, "Evaluate on all of SVAMP's test problems, or list anew")
    return np.array([digit == "0" for digit in kept["alike"]])


# ---- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The runs of a variant.

    `sampled` has samples and right ones by problem, and `mistakes` the kind of each greedy answer, of the
    runs that have them.
    """

    name: str
    runs: list[Result]
    sampled: list[tuple[int, list[int]]]
    mistakes: list[str]

    @cached_property
    def before(self) -> np.ndarray:
        """Which problems were right before training, float [runs, problems]."""
        return np.stack([_digits(run.evaluations[0]["right"]) for run in self.runs])

    @cached_property
    def after(self) -> np.ndarray:
        """Which were right in the end, float [runs, problems]."""
        return np.stack([run.right for run in self.runs])


def tables(
    docs: Path, name: str, results: Sequence[Result], seeds: int, others: Sequence[Result] = ()
) -> str:
    """Returns the tables of a study whose every variant has `seeds` seeds if all are there.

    `others` are runs of another study, among them those without redrawing.
    """
    unlike = unlike_problems(docs, results)
    raw = docs / "study" / "raw" / name / SAMPLED
    problems = results[0].evaluations[0]["problems"]
    variants = [
        Variant(own, runs, *_kept(raw, [r.folder.name for r in runs], problems))
        for own, runs in _by_variant(results).items()
    ]
    base = Variant(NO_TRAINING, [], *_kept(raw, [BASE, AGAIN], problems))
    parts = [_accuracy(variants, unlike, seeds), _pass([base, *variants], unlike, seeds)]
    parts += [
        _redrawn(variants, [*results, *others]),
        _mistakes([base, *variants], seeds),
        _credit(variants, seeds),
    ]
    parts += [_costs(variants), _peaks(variants)]
    return "\n".join(part for part in parts if part)


def in_short(results: Sequence[Result], seeds: int) -> str:
    """Returns what training gained and cost, a row for each variant of a study."""
    before = _digits(results[0].evaluations[0]["right"])[None]
    rows = [[NO_TRAINING, "-", _figure(before), *["-"] * 4]]
    for name, runs in _by_variant(results).items():
        after, summaries = np.stack([run.right for run in runs]), [run.summary for run in runs]
        before = _digits(runs[0].evaluations[0]["right"])[None]  # as in the table of all problems
        minutes = np.mean([s["seconds"] for s in summaries]) / 60
        row = [name, seeds_text(len(runs), seeds), _figure(after), _gap(after, before), _trained(summaries)]
        rows.append([*row, f"{minutes:.0f}", f"{_memory(summaries)[0]} GiB"])
    header = ["", "seeds", "right", "gain, points", "tokens trained", "minutes", "peak memory"]
    return "\n".join(_table(header, rows))


def _by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.variant, []).append(result)
    return found


def _trained(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns the share of the sampled tokens that runs trained."""
    sampled = sum(summary["tokens_sampled"] for summary in summaries)
    return percent(sum(summary["tokens_selected"] for summary in summaries) / sampled)


def _kept(raw: Path, names: Sequence[str], problems: str) -> tuple[list[tuple[int, list[int]]], list[str]]:
    """Returns what is kept of evaluations with samples: samples and right ones by problem, and mistakes."""
    sampled, mistakes = [], []
    for name in names:
        path = raw / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["problems"] != problems:
                raise UserError(str(path), "has answers to other problems", "Remove it, and sample again")
            sampled.append((kept["samples"], kept["right"]))
            mistakes.append(kept["mistakes"])
    return sampled, mistakes


def _digits(text: str) -> np.ndarray:
    return np.array([float(digit) for digit in text])


def _figure(right: np.ndarray) -> str:
    """Returns the mean of float [runs, problems] with its interval."""
    low, high = bootstrap_runs(right)
    return figure_text({"value": float(right.mean()), "low": low, "high": high})


def _gap(first: np.ndarray, second: np.ndarray) -> str:
    """Returns the difference of two, each float [runs, problems], in points with its interval."""
    low, high = bootstrap_gap(first, second)
    return gap_text({"difference": float(first.mean() - second.mean()), "low": low, "high": high})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _accuracy(variants: Sequence[Variant], unlike: np.ndarray, seeds: int) -> str:
    """Returns accuracy before and after, on all problems and on those that are not alike."""
    rows = []
    for variant in variants:
        tests = [_p(*pair) for pair in zip(variant.after, variant.before, strict=True)]
        cells = [variant.name, seeds_text(len(variant.runs), seeds)]
        for which in (np.ones_like(unlike), unlike):
            before, after = variant.before[:, which], variant.after[:, which]
            cells += [_figure(before[:1]), _figure(after), _gap(after, before[:1])]
        rows.append([*cells, ", ".join(tests)])
    header = ["", "seeds", f"{len(unlike)} problems: before", "after", "gain, points"]
    header += [f"the {unlike.sum()} unlike: before", "after", "gain, points", "p of each run, all problems"]
    return "\n".join(["Greedy accuracy, and what training gained:", "", *_table(header, rows)])


def _pass(variants: Sequence[Variant], unlike: np.ndarray, seeds: int) -> str:
    """Returns pass@k of those that were sampled, the first without training; nothing if none was."""
    there = [variant for variant in variants if variant.sampled]
    numbers = {samples for variant in there for samples, _ in variant.sampled}
    if len(numbers) > 1:
        raise UserError(SAMPLED, "runs have different numbers of samples", "Remove them, and sample again")
    if not numbers:
        return ""
    (n,) = numbers
    ks = [k for k in (1, 2, 4, 8, 16) if k <= n]
    rows = []
    for variant in there:
        cells = [variant.name]
        cells.append("-" if not variant.runs else seeds_text(len(variant.sampled), seeds))
        for which, chosen in ((np.ones_like(unlike), ks), (unlike, [ks[0], ks[-1]])):
            for k in chosen:
                values = [[pass_at_k(right, n, k) for right in counts] for _, counts in variant.sampled]
                cells.append(_figure(np.array(values)[:, which]))
        reachable = [pass_at_k(right, n, n) for _, counts in variants[0].sampled for right in counts]
        told = variant.runs and reachable
        cells.append(percent(variant.after.mean() / _mean(reachable)) if told else "-")
        rows.append(cells)
    header = ["", "seeds", *(f"pass@{k}" for k in ks)]
    header += [f"unlike: pass@{k}" for k in (ks[0], ks[-1])]
    header += [f"greedy, as a share of pass@{n} without training"]
    intro = f"Pass@k from {n} sampled answers to each problem (pass@1 is the mean accuracy of these):"
    return "\n".join([intro, "", *_table(header, rows)])


def supervised(docs: Path) -> str:
    """Returns the table of study_supervised.py: accuracy by adapter and epoch; nothing if it was not run."""
    path = docs / SUPERVISED
    if not path.is_file():
        return ""
    by_adapter: dict[str, dict[int, str]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        by_adapter.setdefault(row["adapter"], {})[row["epoch"]] = _figure(_digits(row["right"])[None])
    epochs = next(iter(by_adapter.values()))
    header = ["adapter", *("no training" if not epoch else f"epoch {epoch}" for epoch in epochs)]
    return "\n".join(_table(header, [[name, *figures.values()] for name, figures in by_adapter.items()]))


def _redrawn(variants: Sequence[Variant], results: Sequence[Result]) -> str:
    """Returns what redrawing changes, seed by seed; `results` has the runs without it. Or nothing."""
    rows = []
    for variant in variants:
        name, seeds = variant.name.removesuffix(REDRAW), {run.seed for run in variant.runs}
        runs = [run for run in results if run.variant == name and run.seed in seeds]
        if name == variant.name or {run.seed for run in runs} != seeds:
            continue
        plain = Variant(name, runs, [], [])
        groups = [sum(row.get("redraw/groups", 0) for row in run.steps) for run in variant.runs]
        steps = [np.mean([run.summary["steps"] for run in each.runs]) for each in (plain, variant)]
        row = [name, str(len(runs)), _figure(plain.after), _gap(variant.after, plain.after)]
        tests = ", ".join(_p(*pair) for pair in zip(variant.after, plain.after, strict=True))
        rows.append([*row, tests, f"{np.mean(groups):.0f}", f"{steps[0]:.0f}, {steps[1]:.0f}"])
    if not rows:
        return ""
    header = ["", "seeds", "after, without", "gain by redrawing, points", "p of each run"]
    header += ["groups redrawn", "steps without, with"]
    return "\n".join(
        ["Redrawing prompts without a signal, at the same number of tokens:", "", *_table(header, rows)]
    )


def _p(first: np.ndarray, second: np.ndarray) -> str:
    """Returns p of McNemar's test of two runs, each float [problems]."""
    return f"{mcnemar(first.astype(bool), second.astype(bool)).p_value:.2g}"


def _costs(variants: Sequence[Variant]) -> str:
    """Returns what a run cost, and how its figures moved from the first to the last tenth of its steps."""

    def moved(runs: Sequence[Result], key: str, text: Callable[[float], str]) -> str:
        if any(row.get(key) is None for run in runs for row in run.steps):
            return "-"
        ends = [(_mean(_tenth(run, key, first=True)), _mean(_tenth(run, key))) for run in runs]
        return " to ".join(text(float(np.mean(part))) for part in zip(*ends, strict=True))

    rows = []
    for variant in variants:
        summaries = [run.summary for run in variant.runs]
        ends = [(s["accuracy_before"], s["accuracy_after"]) for s in summaries]
        lengths = [_mean([each["mean_length"] for each in part]) for part in zip(*ends, strict=True)]
        rows.append(
            [
                variant.name,
                f"{np.mean([s['steps'] for s in summaries]):.0f}",
                f"{np.mean([s['tokens_selected'] for s in summaries]):,.0f} ({_trained(summaries)})",
                f"{np.mean([s['update_flops'] for s in summaries]):.3g}",
                f"{np.mean([s['seconds'] for s in summaries]):.0f}",
                moved(variant.runs, "reward", lambda value: f"{value:.2f}"),
                moved(variant.runs, "frac_reward_zero_std", percent),
                moved(variant.runs, "entropy", lambda value: f"{value:.3f}"),
                " to ".join(f"{length:.1f}" for length in lengths),
                *_memory(summaries),
            ]
        )
    header = ["", "steps", "tokens trained", "update FLOPs", "seconds", "reward", "groups without signal"]
    header += ["entropy", "answer, tokens", "peak, GiB", "predicted", "furthest off"]
    intro = (
        "What a run cost, and how it changed: means over the runs. Reward, groups and entropy are those "
        "of the first and the last tenth of the steps, the answer is the greedy one before and after, the "
        "peak is the largest of the runs."
    )
    return "\n".join([intro, "", *_table(header, rows)])


def prediction_error(summary: Mapping[str, Any]) -> float | None:
    """Returns by what share of the measured peak the predicted one was above it, None if not known."""
    measured, predicted = (summary.get(key) for key in ("peak_memory_bytes", "predicted_peak_bytes"))
    return (predicted - measured) / measured if measured and predicted else None


def _memory(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the largest peak, its prediction, and by how much the worst prediction was off."""
    errors = [error for error in map(prediction_error, summaries) if error is not None]
    if len(errors) < len(summaries):
        return ["-", "-", "-"]
    peak, predicted = max((s["peak_memory_bytes"], s["predicted_peak_bytes"]) for s in summaries)
    return [f"{peak / GIB:.2f}", f"{predicted / GIB:.2f}", f"{100 * max(errors, key=abs):+.1f} %"]


def _peaks(variants: Sequence[Variant]) -> str:
    """Returns how far predicted peaks were off, by the commit that a run began with, the furthest first."""
    by_commit: dict[str, list[tuple[float, str]]] = {}
    for variant in variants:
        for run in variant.runs:
            began = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
            if (error := prediction_error(run.summary)) is not None:
                by_commit.setdefault((began.get("commit") or "-")[:12], []).append((error, variant.name))
    rows = []
    for commit, runs in sorted(by_commit.items(), key=lambda item: -max(abs(off) for off, _ in item[1])):
        low, high = (f"{100 * end(off for off, _ in runs):+.1f} %" for end in (min, max))
        rows.append([commit, str(len(runs)), low, high, ", ".join(dict.fromkeys(name for _, name in runs))])
    if not rows:
        return ""
    header = ["commit", "runs", "lowest", "highest", "of"]
    intro = "Predicted peaks of memory against measured ones, by the commit that a run began with:"
    return "\n".join([intro, "", *_table(header, rows)])


def _tenth(run: Result, key: str, first: bool = False) -> list[float]:
    """Returns the values of the first or last tenth of a run's steps, at least one."""
    values = [row[key] for row in run.steps]
    number = max(len(values) // 10, 1)
    return values[:number] if first else values[-number:]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


# ---- where the credit lies ---------------------------------------------------------------------------------

CREDIT = "credit.json"  # in a kept run's folder
PARTS = "numbers and operation", "result", "final answer"  # of an answer
OUTCOMES = "wrong", "mixed", "right"  # of a group: all its answers, some, or none


def parts_of(tokens: Sequence[str]) -> list[str]:
    """Returns the part of an answer, one of PARTS, that each of its tokens belongs to.

    >>> parts_of([" 3", " -", " 2", " =", " 1", "\\n", "####", " 1"])[2:7]
    ['numbers and operation', 'numbers and operation', 'result', 'result', 'final answer']
    """
    parts, text = [], ""
    for token in tokens:
        line = text.rpartition("\n")[2]
        final = "####" in text or token.startswith("####")
        parts.append(PARTS[2 if final else int("=" in line)])
        text += token
    return parts


def credit_of(folder: Path) -> list[dict[str, Any]]:
    """Returns for each step whose completions a run saved what its credit says.

    `groups` counts those of each outcome. By part of an answer, `tokens` counts distinct tokens (once where
    completions share them), `trained` those that have a weight, and `weight` sums the weights' sizes. Empty
    for a run of an older version, which saved no signs.
    """
    settings, rows = load(str(folder)), []
    for step, path in saved_steps(folder).items():
        groups = read_groups(step, path, settings)
        row: dict[str, Any] = {"step": step, "groups": Counter(map(_outcome, groups))}
        row |= {key: Counter() for key in ("tokens", "trained", "weight")}
        for group in groups:
            credit = group.saved_credit()
            if credit is None:
                return []
            place = {
                int(node): part
                for saved, nodes in zip(group.rows, group.trie.paths, strict=True)
                for node, part in zip(nodes, parts_of(saved["tokens"]), strict=True)
            }
            for node, part in place.items():
                weight = float(credit.plus[node] + credit.minus[node])
                row["tokens"][part] += 1
                row["trained"][part] += weight != 0
                row["weight"][part] += abs(weight)
        row["weight"] = {part: float(f"{weight:.4g}") for part, weight in row["weight"].items()}
        rows.append(row)
    return rows


def _outcome(group: SavedGroup) -> str:
    right = sum(row["right"] for row in group.rows)
    return OUTCOMES[0 if not right else 2 if right == len(group.rows) else 1]


def _credit(variants: Sequence[Variant], seeds: int) -> str:
    """Returns where the credit of the runs lies whose saved steps were kept; nothing if none was."""
    rows = []
    for variant in variants:
        files = [path for run in variant.runs if (path := run.folder / CREDIT).is_file()]
        steps = [step for path in files for step in json.loads(path.read_text(encoding="utf-8"))]
        if not steps:
            continue
        first, last = ([step for step in steps if (step["step"] == 1) is begins] for begins in (True, False))
        trained, tokens, weight = (
            [sum(step[key].get(part, 0) for step in steps) for part in PARTS]
            for key in ("trained", "tokens", "weight")
        )
        cells = [variant.name, seeds_text(len(files), seeds)]
        for part in (first, last):
            counts = [sum(step["groups"].get(each, 0) for step in part) for each in OUTCOMES]
            cells.append(", ".join(f"{100 * n / max(sum(counts), 1):.0f}" for n in counts) + " %")
        cells.append(f"{sum(trained):,} of {sum(tokens):,}")
        rows.append([*cells, *(percent(each / (sum(weight) or 1)) for each in weight)])
    if not rows:
        return ""
    intro = (
        "Where the credit lies, in the first step and in every fiftieth: groups whose "
        "answers are all wrong, mixed and all right; distinct tokens that are trained; the share of the "
        "weights on each part of an answer."
    )
    header = ["", "seeds", "groups at step 1: wrong, mixed, right", "later", "tokens trained"]
    return "\n".join([intro, "", *_table([*header, *(f"weight on {part}" for part in PARTS)], rows)])


# ---- wrong answers -----------------------------------------------------------------------------------------

# A line of arithmetic: two numbers, what is done with them, and the result that is claimed.
_LINE = re.compile(r"(-?[\d.]+) *([-+*/]) *(-?[\d.]+) *= *(-?[\d.]+)")
_WORK: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
RIGHT = "."
MISTAKES = {
    "r": "a wrong result of the right operations",
    "o": "other operations or numbers, with right results",
    "b": "other operations or numbers, and a wrong result",
    "n": "no line of arithmetic",
}


def mistake(completion: str, answer: str) -> str:
    """Returns the key in MISTAKES of a wrong answer.

    Its lines are worked out, with right results in place of wrong ones where later lines use them: if the
    last gives `answer`, only results were wrong.
    """
    true: dict[float, float] = {}  # what stands for a claimed result
    found, slips = None, 0
    for first, sign, second, claimed in _LINE.findall(completion.replace(",", "")):
        try:
            left, right, said = float(first), float(second), float(claimed)
            found = _WORK[sign](true.get(left, left), true.get(right, right))
            slips += abs(_WORK[sign](left, right) - said) > _ROUNDED
        except (ValueError, ZeroDivisionError):
            continue
        true[said] = found
    if found is None:
        return "n"
    if abs(found - float(answer.replace(",", ""))) <= _ROUNDED:
        return "r"
    return "b" if slips else "o"


def _mistakes(variants: Sequence[Variant], seeds: int) -> str:
    """Returns how many answers have which mistake, of those runs whose answers were kept; or nothing."""
    rows = []
    for variant in variants:
        if variant.mistakes:
            cells = [variant.name, "-" if not variant.runs else seeds_text(len(variant.mistakes), seeds)]
            cells += [_share(variant.mistakes, key) for key in (RIGHT, *MISTAKES)]
            rows.append(cells)
    if not rows:
        return ""
    intro = "Greedy answers of the final adapters by mistake (a right answer by a wrong way counts as right):"
    return "\n".join([intro, "", *_table(["", "seeds", "right", *MISTAKES.values()], rows)])


def _share(kinds: Sequence[str], key: str) -> str:
    return percent(sum(each.count(key) for each in kinds) / sum(map(len, kinds)))


def print_wrong(evaluation: Path, number: int, seed: int) -> None:
    """Prints wrong greedy answers, drawn by a seed: problem, right answer, and what the model wrote."""
    greedy = _greedy(evaluation)
    mistakes = [row for row in greedy if not row["right"]]
    drawn = random.Random(seed).sample(mistakes, min(number, len(mistakes)))
    kinds = Counter(mistake(row["completion"], row["answer"]) for row in mistakes)
    print(f"{len(mistakes)} of {len(greedy)} greedy answers are wrong:")
    for key, text in MISTAKES.items():
        print(f"{kinds[key]:4} {text}")
    print(f"\n{len(drawn)} of them:")
    for place, row in enumerate(sorted(drawn, key=lambda row: row["problem"]), 1):
        end = "" if row["finished"] else " (cut off)"
        print(f"\n---- {place} of {len(drawn)}, problem {row['problem']}\n{row['prompt']}")
        print(f"right: {row['answer']}, read: {row['read']}{end}\n{row['completion']}")


def print_changed(base: Path, evaluation: Path, number: int) -> None:
    """Prints how many greedy answers became right and wrong, and the first `number` that became right."""
    before, after = _greedy(base), _greedy(evaluation)
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        raise UserError(str(evaluation), f"has answers to other problems than {base}", "Evaluate both alike")
    pairs = list(zip(before, after, strict=True))
    won = [pair for pair in pairs if pair[1]["right"] and not pair[0]["right"]]
    lost = sum(old["right"] and not new["right"] for old, new in pairs)
    same = sum(old["completion"] == new["completion"] for old, new in pairs)
    print(
        f"Of {len(pairs)} greedy answers {len(won)} became right, {lost} became wrong, {same} are unchanged."
    )
    for old, new in won[:number]:
        print(f"\n---- problem {new['problem']}\n{new['prompt']}\nright: {new['answer']}")
        print(f"before:{old['completion']}\nafter:{new['completion']}")


def _greedy(evaluation: Path) -> list[dict[str, Any]]:
    """Returns the greedy answers of an evaluation, problem by problem."""
    path = evaluation / COMPLETIONS
    if not path.is_file():
        fix = "Pass the folder that twig eval --output wrote"
        raise UserError(str(evaluation), f"holds no {COMPLETIONS}", fix)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["sample"] is None), key=lambda row: row["problem"])


if __name__ == "__main__":
    sys.exit(main())
