"""The plain engine: the model is only called whole, with one row per completion.

Slower than `policy.Policy`, and right for any architecture. Nothing is shared, recorded or checkpointed. The
model's own forward over a whole text is what counts: its cache is used while sampling only if it gives the
same.

Knows nothing of tries, rewards or algorithms. Legend: B rows, L columns, N targets, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twig.common.errors import UserError
from twig.engine.base_policy import BasePolicy, OpenStem
from twig.engine.decoder import lengths_of, logit_tolerance, set_to
from twig.engine.pack import Pack
from twig.runtime.memory_use import out_of_memory

# The texts that are checked, their tokens, and how many of these come one by one.
_ROWS, _CHECKED, _STEPS = 4, 12, 4


class PlainPolicy(BasePolicy):
    """A policy whose model is only called whole, for architectures that `policy.Policy` refuses.

    `caches` tells whether the model's cache is used while sampling, `passes_positions` whether the positions
    of the tokens behind it are passed: some models count them from 0 at every call.
    """

    engine = "plain"
    shares_prefixes = False
    can_checkpoint = False

    def _set_up(self) -> None:
        length = max(min(_CHECKED, self.context_length or _CHECKED), _STEPS + 1)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.embeddings.shape[0], (_ROWS, length), generator=draw).to(self.device)
        fix = "Choose an adapter on modules that the model runs"
        self._refuse_unmoved(lambda: self._logits(ids), fix)
        for places in [[], *lengths_of(self.model).values()]:
            with set_to(places):
                self._refuse_not_causal(ids, real=not places)
        self._choose_cache(ids)

    @torch.no_grad()
    def _refuse_not_causal(self, ids: Int[Tensor, "B L"], real: bool) -> None:
        """Raises UserError for a model whose logits of a text depend on what comes after.

        A row is run with other tokens behind its own, if only padding. `real` is False if a length of the
        model was made short, as the text is: a number that the model does not run with is no length.
        """
        try:
            whole = self._logits(ids)
            parts = [self._logits(ids[:, :length]) for length in range(2, ids.shape[1], 3)]
        except Exception as error:
            if real or out_of_memory(error):
                raise
            return
        if not whole.isfinite().all():
            return  # sampling says so
        gap = max(float((whole[:, : part.shape[1]] - part).abs().max()) for part in parts)
        if not gap <= logit_tolerance(self.model) * float(whole.abs().max()):
            problem = f"model type '{self.model.config.model_type}' predicts a token from those behind it"
            raise UserError("model.name", problem, "Choose a causal language model")

    @torch.no_grad()
    def next_logits(
        self, ids: Int[Tensor, "B L"], start: int = 0, cache: Any = None
    ) -> tuple[Float[Tensor, "B L V"], Any]:
        """Returns the model's logits of tokens at positions from `start` on, and its cache with them.

        The cache is None if it is not to be used: then the whole text has to be passed each time.
        """
        if not self.caches:
            return self._logits(ids), None
        options = {}
        if start and self.passes_positions:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            options["position_ids"] = positions.expand(len(ids), -1)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return out.logits, getattr(out, "past_key_values", None)

    def _logits(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def _choose_cache(self, ids: Int[Tensor, "B L"]) -> None:
        """Sets how sampling uses the model's cache: as it gives the logits of the whole text."""
        whole = self._logits(ids)
        bound = logit_tolerance(self.model) * whole.abs().max()
        for passes_positions in (False, True):
            self.caches, self.passes_positions = True, passes_positions
            try:
                logits = self._in_steps(ids)
            except Exception as error:  # what a model raises that takes no such arguments
                if out_of_memory(error):
                    raise
                continue
            if logits is None:
                break
            if (logits - whole).abs().max() <= bound:
                return
        self.caches = False

    def _in_steps(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"] | None:
        """Returns logits of a text whose last tokens come one by one; None if the model has no such cache."""
        first = ids.shape[1] - _STEPS
        logits, cache = self.next_logits(ids[:, :first])
        parts = [logits]
        for at in range(first, ids.shape[1]):
            if cache is None:
                return None
            logits, cache = self.next_logits(ids[:, at : at + 1], at, cache)
            parts.append(logits)
        return torch.cat(parts, 1)

    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        rows, ids = self._tensor(pack.rows), self._tensor(pack.ids)
        logits = self._logits(ids).flatten(0, 1)[rows]
        logps = torch.log_softmax(self.sampled_logits(logits), -1)
        return logps[self._tensor(pack.targets.row), self._tensor(pack.targets.token)]
