"""The plain engine: the model is only called whole, with one row per completion.

Slower than `policy.Policy`, and right for any architecture. Nothing is shared, recorded or checkpointed.

Knows nothing of tries, rewards or algorithms. Legend: N targets.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from twig.engine.base_policy import BasePolicy, OpenStem
from twig.engine.pack import Pack


class PlainPolicy(BasePolicy):
    """A policy whose model is only called whole, for architectures that `policy.Policy` refuses."""

    engine = "plain"
    shares_prefixes = False
    can_checkpoint = False

    def _set_up(self) -> None:
        """Needs nothing more: any model can be called whole."""

    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        rows, ids = self._tensor(pack.rows), self._tensor(pack.ids)
        logits = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        logps = torch.log_softmax(self.sampled_logits(logits), -1)
        return logps[self._tensor(pack.targets.row), self._tensor(pack.targets.token)]
