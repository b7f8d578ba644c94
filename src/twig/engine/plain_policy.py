"""The plain engine: the model is only called whole, with one row per completion.

Slower than `policy.Policy`, and right for any architecture. In an update nothing is shared, recorded or
checkpointed. While sampling, prompts are read together, each once, and completions that are equal so far are
one row. The model's own forward over a whole text is what counts: batches with padding, its cache, and the
head in one pass are used only if they give the same.

Knows nothing of tries, rewards or algorithms. Legend: B rows, L columns, N branches, R head rows, D hidden, V
vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twig.common.errors import UserError
from twig.engine.base_policy import BasePolicy, OpenStem
from twig.engine.decoder import head_terms, lengths_of, logit_tolerance, set_to
from twig.engine.kv_cache import StopForward
from twig.engine.lm_head import Head
from twig.engine.pack import Pack
from twig.runtime.memory_use import out_of_memory

# The texts that are checked, their tokens, and how many of these come one by one.
_ROWS, _CHECKED, _STEPS = 4, 12, 4
_CACHES = ("past_key_values", "cache_params")  # what models call the cache that they take and return
_BY_LENGTH = {"dynamic", "longrope"}  # rotary embeddings of a row that depend on the longest one


@dataclass(frozen=True)
class Reading:
    """How a model reads texts that grow: with its `cache`, batches padded on the left, positions passed.

    Some models count the tokens behind a cache from 0 at every call unless they get positions.
    """

    cache: bool = True
    pads: bool = True
    positions: bool = True


# From the fastest on; the last one is right for any model.
_READINGS = (
    Reading(),
    Reading(positions=False),
    Reading(pads=False, positions=False),
    Reading(pads=False),
    Reading(cache=False, pads=False, positions=False),
)


@dataclass
class GrowingTexts:
    """Texts that are read together: `ids` [N, L] and where each begins behind its padding, `starts` [N].

    `logits` [N, V] are those of the next token, `cache` is the model's own (None if it is not used).
    """

    model: Callable[..., Any]
    reading: Reading
    options: dict[str, Any]
    ids: Int[Tensor, "N L"]
    starts: Int[Tensor, " N"]
    cache_name: str
    cache: Any = None
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._read(self.ids)

    def extend(self, parents: Int[np.ndarray, " M"], tokens: Int[np.ndarray, " M"]) -> None:
        """Replaces the texts by those of rows `parents`, each with one token more."""
        rows = torch.from_numpy(parents).to(self.ids.device)
        new = torch.from_numpy(tokens).to(self.ids.device)[:, None]
        if len(parents) != len(self.ids) or (parents != np.arange(len(parents))).any():
            self.ids, self.starts = self.ids[rows], self.starts[rows]
            self.cache = _rows_of(self.cache, rows)
        self.ids = torch.cat([self.ids, new], 1)
        self._read(self.ids if self.cache is None else new)

    def _read(self, new: Int[Tensor, "N L"]) -> None:
        """Runs the model on the last columns of the texts, `new`, behind its cache."""
        slots = torch.arange(self.ids.shape[1], device=new.device)
        options = dict(self.options)
        if self.reading.pads and bool(self.starts.any()):
            options["attention_mask"] = (slots >= self.starts[:, None]).long()
        if self.reading.positions:
            first = slots[len(slots) - new.shape[1] :]
            options["position_ids"] = (first - self.starts[:, None]).clamp(min=0)
        if self.reading.cache:
            options[self.cache_name] = self.cache
        out = self.model(input_ids=new, use_cache=self.reading.cache, **options)
        self.cache = getattr(out, self.cache_name, None) if self.reading.cache else None
        self.logits = out.logits[:, -1]


class PlainPolicy(BasePolicy):
    """A policy whose model is only called whole, for architectures that `policy.Policy` refuses.

    `reading` is how it samples. `head_scale` and `head_softcap` are what follows the head's product in the
    model; `one_pass` tells whether the head can be applied to chosen rows alone.
    """

    engine = "plain"
    shares_prefixes = False
    can_checkpoint = False

    def _set_up(self) -> None:
        length = max(min(_CHECKED, self.context_length or _CHECKED), _STEPS + 1)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.embeddings.shape[0], (_ROWS, length), generator=draw).to(self.device)
        self.head_scale, self.head_softcap = head_terms(self.model.config.get_text_config())
        fix = "Choose an adapter on modules that the model runs"
        self._refuse_unmoved(lambda: self._logits(ids), fix)
        for places in [[], *lengths_of(self.model).values()]:
            with set_to(places):
                self._refuse_not_causal(ids, real=not places)
        with self.base():  # so that a run and whoever loads its adapter decide alike: see `Policy`
            self.one_pass = self._can_choose_rows(ids)
            self._choose_reading(ids)

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

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns which prompts, by their lengths, are read together: all, or those of the same length."""
        if self.reading.pads:
            return [list(range(len(lengths)))]
        return [[i for i, n in enumerate(lengths) if n == each] for each in dict.fromkeys(lengths)]

    @torch.no_grad()
    def read(self, prompts: Sequence[np.ndarray]) -> GrowingTexts:
        """Runs prompts of one of the `batches`, each once, and returns them as texts to extend."""
        return self._texts(prompts, self.reading)

    def _texts(self, prompts: Sequence[np.ndarray], reading: Reading) -> GrowingTexts:
        starts = max(map(len, prompts)) - np.array([len(each) for each in prompts])
        table = np.zeros((len(prompts), int(starts[0]) + len(prompts[0])), np.int64)
        for row, start, prompt in zip(table, starts, prompts, strict=True):
            row[start:] = prompt
        takes = inspect.signature(self.model.forward).parameters
        cache = next((name for name in _CACHES if name in takes), _CACHES[0])
        # the prompt's other logits are not needed
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        ids, first = (torch.from_numpy(x).to(self.device) for x in (table, starts))
        return GrowingTexts(self.model, reading, options, ids, first, cache)

    def _logits(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def _choose_reading(self, ids: Int[Tensor, "B L"]) -> None:
        """Sets how sampling reads texts: as it gives the logits of the whole text."""
        whole = self._logits(ids)
        bound = logit_tolerance(self.model) * whole.abs().max()
        by_length = _rotary_kinds(self.model.config.get_text_config()) & _BY_LENGTH
        for self.reading in _READINGS:
            if not self.reading.cache:
                return
            if self.reading.pads and by_length:
                continue
            try:
                gap = self._gap(ids, whole)
            except Exception as error:  # what a model raises that takes no such arguments
                if out_of_memory(error):
                    raise
                continue
            if gap is not None and gap <= bound:
                return

    def _gap(self, ids: Int[Tensor, "B L"], whole: Float[Tensor, "B L V"]) -> Tensor | None:
        """Returns how far logits of texts that grow are from the whole texts'; None if there is no cache.

        The texts begin with a part of their rows, of several lengths if they can be padded; then a row is
        doubled, and two are left out.
        """
        first = ids.shape[1] - _STEPS
        lengths = [first - (row % first if self.reading.pads else 0) for row in range(len(ids))]
        host = ids.cpu().numpy()
        texts = self._texts([row[:n] for row, n in zip(host, lengths, strict=True)], self.reading)
        rows, gaps = np.arange(len(ids)), []
        for step, parents in enumerate([[3, 2, 1, 0, 0], None, [0, 2, 4], None][:_STEPS]):
            at = np.array(lengths)[rows] + step - 1
            gaps.append((texts.logits - whole[rows, at]).abs().max())
            if texts.cache is None:
                return None
            chosen = np.arange(len(rows)) if parents is None else np.array(parents)
            rows = rows[chosen]
            texts.extend(chosen, host[rows, np.array(lengths)[rows] + step])
        at = np.array(lengths)[rows] + _STEPS - 1
        gaps.append((texts.logits - whole[rows, at]).abs().max())
        return torch.stack(gaps).amax()

    @torch.no_grad()
    def _can_choose_rows(self, ids: Int[Tensor, "B L"]) -> bool:
        """Tells whether the head in one pass gives the model's own logits."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or head.weight.requires_grad:
            return False
        whole = self._logits(ids).flatten(0, 1)
        hidden = self._before_head(ids)
        if hidden is None or hidden.shape[:-1] != ids.shape:
            return False
        if not whole.isfinite().all():
            return False
        logits, _ = self._head(temperature=1.0, suppressed=None).logits(
            hidden.flatten(0, 1), 0, len(head.weight)
        )
        return bool((logits - whole).abs().max() <= logit_tolerance(self.model) * whole.abs().max())

    def _before_head(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"] | None:
        """Returns what the model hands to its head, which is not run; None if it calls no head."""
        head: Any = self.model.get_output_embeddings()
        with _stopped_at(head) as inputs:
            try:
                self._logits(ids)
            except StopForward:
                return inputs[0]
        return None

    def _head(self, temperature: float, suppressed: Tensor | None) -> Head:
        head: Any = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.detach()
        terms = (self.head_scale, self.head_softcap, temperature, suppressed, self.head_chunk)
        return Head(head.weight.detach(), bias, *terms, self.kernels == "onednn")

    def _target_logps(
        self, pack: Pack, boundary: Tensor | None, opened: OpenStem | None
    ) -> Float[Tensor, " N"]:
        rows, ids = self._tensor(pack.rows), self._tensor(pack.ids)
        row, token = self._tensor(pack.targets.row), self._tensor(pack.targets.token)
        if self.one_pass:
            hidden = self._before_head(ids)
            assert hidden is not None, "checked at the start"
            head = self._head(self.temperature, self.suppressed if len(self.suppressed) else None)
            return head.logps(hidden.flatten(0, 1)[rows], row, token)
        logits = self._logits(ids).flatten(0, 1)[rows]
        logps = torch.log_softmax(self.sampled_logits(logits), -1)
        return logps[row, token]


@contextmanager
def _stopped_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, calling `module` raises StopForward; its input is kept in the list."""
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        raise StopForward

    hook = module.register_forward_pre_hook(stop)
    try:
        yield inputs
    finally:
        hook.remove()


def _rows_of(cache: Any, rows: Int[Tensor, " M"]) -> Any:
    """Returns a cache of the given rows of a model's cache."""
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
        return cache
    if isinstance(cache, tuple | list):
        return type(cache)(_rows_of(each, rows) for each in cache)
    return cache.index_select(0, rows) if isinstance(cache, Tensor) else cache


def _rotary_kinds(config: Any) -> set[str]:
    """Returns the kinds of rotary embedding that a config names."""
    rope = getattr(config, "rope_parameters", None) or {}
    entries = [each for each in (rope, *rope.values()) if isinstance(each, dict)]
    return {str(entry["rope_type"]) for entry in entries if "rope_type" in entry}
