"""Compares what `twig plan --measure` says with how long the runs then take.

    python benchmarks/estimates.py quickstart "quickstart algorithm.name=grpo" "FILE.yaml train.max_steps=50"

Each argument is a recipe or file with settings. `alone` leaves out what this process waited for a core, on
Linux: it compares the estimates on a machine that has other work too.
"""

import argparse
import tempfile
from pathlib import Path

from twig.common.progress import Progress
from twig.config.load import load
from twig.training.estimate import _Watch, measure_run
from twig.training.train import train


def main() -> None:
    """Prints a row for each source."""
    parser = argparse.ArgumentParser(description="Estimates of time and tokens against what runs take.")
    parser.add_argument("sources", nargs="+", metavar="'RECIPE KEY=VALUE ...'")
    sources = parser.parse_args().sources
    heads = ["run", "steps measured"]
    for what in ("seconds", "alone", "tokens"):
        heads += [f"{what}, said", "true", "error"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for source in sources:
        name, *overrides = source.split()
        settings = load(name, overrides)
        said = measure_run(settings, Progress())
        watch = _Watch(Progress())
        with tempfile.TemporaryDirectory() as folder:
            summary = train(settings, output=Path(folder) / "run", progress=watch).summary
        taken = summary["seconds"] + sum(seconds for seconds, _ in watch.evaluated)
        expected, sampled = said.training + said.evaluating, summary["tokens_sampled"]
        alone = expected * (1 - said.waiting), taken * (1 - watch.waiting)
        row = [source, f"{said.measured}"]
        for one, other in ((expected, taken), alone, (said.tokens, sampled)):
            row += [f"{one:,.0f}", f"{other:,.0f}", f"{one / other - 1:+.0%}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
