"""Runs of a study made up for tests."""

from twig.runs.folder import RunLog
from twig.study.runner import folder_of
from twig.study.tables import Result


def write_run(planned, study, evaluations, tokens, flops=1000, seconds=2.0, more=None, summary=None):
    """A finished run as `twig train` leaves it: `evaluations` by step, `tokens` sampled in each step.

    `more` has further metrics, each with a value for every step; `summary` further parts of the summary.
    """
    log = RunLog.create(folder_of(study, planned), planned.settings)
    for step, sampled in enumerate(tokens, 1):
        row = {"tokens/sampled": sampled, "time/step": seconds, "entropy": 1.0 / step}
        row |= {name: values[step - 1] for name, values in (more or {}).items()}
        log.log(step, row)
    for step, right in evaluations.items():
        log.save_evaluation(step, {"problems": "sha256:1", "right": right, "answered": right})

    def accuracy(right):
        value = right.count("1") / len(right)
        figures = {"value": value, "low": 0.0, "high": 1.0, "n": len(right), "found": 0.5}
        return figures | {"mean_length": 7.0}

    steps = sorted(evaluations)
    log.save_summary(
        {
            **{"status": "finished", "algorithm": "t-spmo", "task": "multiplication"},
            "steps": len(tokens),
            "accuracy_before": accuracy(evaluations[steps[0]]),
            "accuracy_after": accuracy(evaluations[steps[-1]]),
            "tokens_sampled": sum(tokens),
            "tokens_selected": sum(tokens) // 2,
            "nodes_run": 10,
            "update_flops": flops,
            "seconds": seconds * len(tokens),
            **(summary or {}),
        }
    )
    log.close()
    return Result(planned.variant, planned.seed, folder_of(study, planned))
