"""When a completion ends: with an end token, or with the token that completes a stop text.

`sampler._Recorder.choose` and `decode_graph.DecodeStep._choose` look for end tokens and for the limit on the
length. A rule that reads text needs the plain loop: see `loops.choose_loop`. Knows nothing of models.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

Decode = Callable[[list[np.ndarray]], list[str]]  # lists of ids to texts


class Ending:
    """Says which rows of a wave end with their newest token: an end token, or the end of a stop text."""

    def __init__(
        self,
        end_ids: Sequence[int],
        stop: Sequence[str],
        decode: Decode,
        prefixes: list[np.ndarray],
    ) -> None:
        self.end_ids, self.stop, self.decode, self.prefixes = list(end_ids), list(stop), decode, prefixes
        # A token is at least a byte of the text. The other 4 are for tokens that a decoder treats differently
        # at the beginning of a text.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 4

    def stopped(self, ids: Int[Tensor, "A T"], rows: Int[Tensor, " A"]) -> Bool[Tensor, " A"]:
        """Returns whether the ids so far of the wave's `rows` end with a stop text."""
        tails = ids[:, -self.reach :].cpu().numpy()
        missing = self.reach - tails.shape[1]
        if missing:
            tails = [
                np.concatenate([self.prefixes[r][-missing:], tail])
                for r, tail in zip(rows.tolist(), tails, strict=True)
            ]
        ended = [any(text in tail for text in self.stop) for tail in self.decode(list(tails))]
        return torch.tensor(ended, device=ids.device)
