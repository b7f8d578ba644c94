"""When a completion ends: with an end token, or with the token that completes a stop text.

`engine.sampler` and `engine.decode_graph` look for end tokens and for the limit on the
length. A rule that reads text needs the plain loop: see `engine.loops.choose_loop`. Knows nothing of models.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

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

    def stopped(self, ids: Int[np.ndarray, "A T"], rows: Int[np.ndarray, " A"]) -> Bool[np.ndarray, " A"]:
        """Returns whether the ids so far of the wave's `rows` end with a stop text."""
        tails = list(ids[:, -self.reach :])
        missing = self.reach - ids.shape[1]
        if missing > 0:
            tails = [
                np.concatenate([self.prefixes[r][-missing:], tail])
                for r, tail in zip(rows, tails, strict=True)
            ]
        return np.array([any(text in tail for text in self.stop) for tail in self.decode(tails)], bool)
