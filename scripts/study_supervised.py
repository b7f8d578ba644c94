"""How much a model learns from the problems of the study on word problems if it is told the answers.

    python scripts/study_supervised.py --base smollm2-words --svamp SVAMP

Trains adapters with TRL's SFTTrainer on the worked answers to the training problems that the studies of
learning rates train on, and after every epoch answers the same 200 held-out ones greedily. What was stopped
is resumed. `scripts/study.py tables` makes a table of the results, docs/study/raw/svamp-supervised.json.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_words import ROOT, SUPERVISED

from twig.common.errors import UserError
from twig.common.files import write_whole
from twig.config.load import load
from twig.core.types import Example
from twig.evaluation.record import RESULT, read_evaluation
from twig.runtime.machine import environment
from twig.tasks.load import load_task

sys.path.append(str(ROOT / "examples" / "word_problems"))
from problems import (  # pyright: ignore[reportMissingImports]
    Problem,
    apply,
    is_short,
    prefix,
    work_out,
    write_solution,
)
from warm_start import last_checkpoint, trainer_of  # pyright: ignore[reportMissingImports]

RECIPE = "svamp-smollm2-135m"
# Settings of the recipe that decide what is asked, and how it is answered.
ASKED = ("model.dtype", "task.name", "task.chat", "task.prompt_template", "rollout.max_completion_length")
EPOCHS, BATCH, RATE, RANK, SEED = 4, 20, 1e-3, 16, 0
ADAPTERS: dict[str, dict[str, Any]] = {
    "q_proj and v_proj, last third": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": list(range(20, 30)),
    },
    "all linear modules": {"target_modules": "all-linear"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and evaluates every adapter; returns 2 after an error of one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="the model of the studies, a folder")
    parser.add_argument("--svamp", type=Path, required=True, help="SVAMP: a folder with train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("studies/svamp-supervised"), help="run folders")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where study/ is")
    options = parser.parse_args(argv)
    try:
        rows = [row for name in ADAPTERS for row in learn(name, options)]
    except UserError as error:
        print(f"study_supervised: {error}", file=sys.stderr)
        return 2
    versions = environment()["versions"]
    write_whole(options.docs / SUPERVISED, json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    return 0


def learn(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains one adapter, and returns what is right of the held-out problems after each of its epochs."""
    data = [f"task.path={options.svamp / 'train.jsonl'}", "task.eval_size=200"]
    task = load_task(load(RECIPE, data))
    problems, held_out = (
        [problem for problem in map(worked, split) if problem is not None]
        for split in (task.train, task.eval)
    )
    steps = len(problems) // BATCH  # of an epoch
    rng = random.Random(SEED)
    ordered = [problem for _ in range(EPOCHS) for problem in rng.sample(problems, steps * BATCH)]
    output = options.work / name.replace(",", "").replace(" ", "-")
    last = output / f"checkpoint-{EPOCHS * steps}"
    checkpoint = last_checkpoint(output)
    if checkpoint != last:
        arguments = argparse.Namespace(
            base=options.base, output=output, steps=EPOCHS * steps, batch_size=BATCH, learning_rate=RATE,
            schedule="cosine", warmup_steps=10, rank=RANK, save_steps=steps, log_steps=5, seed=SEED,
        )  # fmt: skip
        trainer = trainer_of(arguments, ordered, held_out, ADAPTERS[name])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    rows = []
    for epoch in range(EPOCHS + 1):
        folder = output / f"evaluation-{epoch}"
        if not (folder / RESULT).is_file():
            recipe = load(RECIPE).flat()
            given = [*data, *(f"{key}={json.dumps(recipe[key])}" for key in ASKED)]
            given += [f"model.adapter={output}/checkpoint-{epoch * steps}"] * (epoch > 0)
            command = [sys.executable, "-m", "twig", "eval", options.base, *given, "--output", str(folder)]
            if subprocess.run(command).returncode:
                raise UserError(str(folder), "twig eval failed", "See its error above")
        read = read_evaluation(folder)
        right = "".join("1" if each else "0" for each in read.right)
        rows.append({"adapter": name, "epoch": epoch, "problems": read.problems, "right": right})
    return rows


def worked(example: Example) -> Problem | None:
    """Returns a problem of SVAMP with its equation as worked lines; None if a line has no short result.

    >>> row = {"question": "...", "Equation": "( ( 8.0 - 2.0 ) / 3.0 )"}
    >>> worked(Example("...", row)).solution
    ' 8 - 2 = 6\\n6 / 3 = 2\\n#### 2'
    """

    steps = work_out(prefix(example.columns["Equation"]), ())
    if not steps or not all(is_short(number) for step in steps for number in (*step[1:], apply(*step))):
        return None
    return Problem(example.columns["question"], *write_solution(steps), "svamp")


if __name__ == "__main__":
    sys.exit(main())
