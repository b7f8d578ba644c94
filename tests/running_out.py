"""What the tests of running out of memory share."""

from gradients import scored

from twig.common.progress import Progress
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Objective
from twig.engine.update import LogProbs, Passes


class Heard(Progress):
    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


def gradient_of(policy, batch, sizes=None, progress=None, beta=0.0, old=False):
    """The whole update of a batch: (loss, gradients), and its passes."""
    for parameter in policy.parameters.values():
        parameter.grad = None
    passes = Passes(
        policy, sizes or Sizes(128, 64, 2**22, False), progress or Progress(), scored(*batch), None
    )
    before = passes.logps() if old else None
    with policy.base():
        ref = passes.logps() if beta else None
    _, loss = passes.backward(Objective(beta=beta), LogProbs(before, ref))
    return (loss, {n: p.grad.clone() for n, p in policy.parameters.items()}), passes
