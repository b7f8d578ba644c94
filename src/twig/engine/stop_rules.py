"""When a completion ends: with an end token, or with the token that completes a stop text.

End tokens are looked for in `sampler._Recorder.choose` and in `decode_graph.DecodeStep._choose`, the limit on
the length too. A rule that reads text needs the plain loop: see `sampler._way` and
`planner.plan._decodes_by_graph`. Knows nothing of models.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Ending:
    """Which rows of a wave end with their newest token: an end token, or one that completes a stop text."""

    def __init__(
        self,
        end_ids: Sequence[int],
        stop: Sequence[str],
        decode: Callable[[list[np.ndarray]], list[str]],
        prefixes: list[np.ndarray],
    ) -> None:
        self.end_ids, self.stop, self.decode, self.prefixes = list(end_ids), list(stop), decode, prefixes
        # A token is at least a byte of the text. The others are room for those that a decoder treats
        # differently at the beginning of a text.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 4

    def stopped(self, ids: Int[Tensor, "A T"], rows: Int[Tensor, " A"]) -> Bool[Tensor, " A"]:
        """Whether the ids so far of the wave's `rows` have a stop text at their end."""
        tails = ids[:, -self.reach :].cpu().numpy()
        missing = self.reach - tails.shape[1]
        if missing:
            tails = [
                np.concatenate([self.prefixes[r][-missing:], tail])
                for r, tail in zip(rows.tolist(), tails, strict=True)
            ]
        found = [any(text in tail for text in self.stop) for tail in self.decode(list(tails))]
        return torch.tensor(found, device=ids.device)
