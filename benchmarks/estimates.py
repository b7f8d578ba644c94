"""Compares what `twig plan --measure` says with how long the runs then take.

    python benchmarks/estimates.py quickstart "quickstart algorithm.name=grpo" "FILE.yaml train.max_steps=50"

Each argument is a recipe or file with settings. Needs a machine that does nothing else.
"""

import sys
import tempfile
from pathlib import Path

from twig.common.progress import Progress
from twig.config.load import load
from twig.training.estimate import _Watch, measure_run
from twig.training.train import train


def main(sources: list[str]) -> int:
    """Prints a row for each source."""
    print("| run | seconds, said | seconds, taken | error | tokens, said | tokens, sampled | error |")
    print("|---|---|---|---|---|---|---|")
    for source in sources:
        name, *overrides = source.split()
        settings = load(name, overrides)
        said = measure_run(settings, Progress())
        watch = _Watch(Progress())
        with tempfile.TemporaryDirectory() as folder:
            summary = train(settings, output=Path(folder) / "run", progress=watch).summary
        taken = summary["seconds"] + sum(seconds for seconds, _ in watch.evaluated)
        expected, sampled = said.training + said.evaluating, summary["tokens_sampled"]
        row = [source, f"{expected:.0f}", f"{taken:.0f}", f"{expected / taken - 1:+.0%}"]
        row += [f"{said.tokens:,.0f}", f"{sampled:,}", f"{said.tokens / sampled - 1:+.0%}"]
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
