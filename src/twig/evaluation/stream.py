"""Answers prompts token by token, by a model and by its base, for `twig chat`.

Decodes greedily, as an evaluation does, with the model called whole: any architecture will do.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twig.common.errors import UserError
from twig.common.text import storable
from twig.common.tokenizer import Tokenizer
from twig.config.load import Settings
from twig.core.stop_rules import Decode, Ending
from twig.core.types import Example
from twig.engine.build import build_policy
from twig.engine.load import end_ids, load_model, load_tokenizer, vocabulary_of
from twig.engine.lora import attach
from twig.engine.plain_policy import GrowingTexts, PlainPolicy
from twig.engine.sampler import SamplingParams
from twig.tasks.base import Task
from twig.tasks.load import texts_of
from twig.tasks.prompts import encode_prompt, names_in, refuse_too_long

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character yet
_FIELDS = ("question", "prompt")  # of a template, which a problem fills


@dataclass(frozen=True)
class Token:
    """A token of an answer: its id, the text that it adds, and its probability.

    The text is empty for a token that ends inside a character; the one that completes it adds it whole.
    """

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Candidate:
    """A token that could come next: its text, and its probability by the base and by the trained model."""

    text: str
    base: float
    trained: float


class Speaker:
    """A model with a run's texts; `trained` says whether it has an adapter beside its base."""

    def __init__(self, policy: PlainPolicy, tokenizer: Tokenizer, task: Task, params: SamplingParams) -> None:
        self.policy, self.tokenizer, self.params = policy, tokenizer, params
        self.task, self.trained = task, True

    @classmethod
    def load(cls, settings: Settings) -> "Speaker":
        """Loads the model that the settings name, `model.adapter` included; raises UserError."""
        plain = settings.model.model_copy(update={"engine": "plain", "kernels": "torch"})
        settings = settings.model_copy(update={"model": plain})
        tokenizer = load_tokenizer(settings.model)
        model, _ = load_model(settings.model, tokenizer)
        adapter = settings.model.adapter
        peft_model = attach(model, **dict(settings.lora), seed=settings.train.seed, adapter=adapter)
        policy = build_policy(peft_model, settings)
        assert isinstance(policy, PlainPolicy)
        task = texts_of(settings)
        if set(names_in(task.prompt_template)) - {*_FIELDS}:
            task = replace(task, prompt_template=None)  # the problem is written as the template would
        params = SamplingParams.of(settings, tokenizer, end_ids(model, tokenizer))
        speaker = cls(policy, tokenizer, task, params)
        speaker.trained = adapter is not None
        return speaker

    def encode(self, problem: str) -> np.ndarray:
        """Returns the ids of a problem in the run's texts; raises UserError if the model cannot read it."""
        if not self.tokenizer(storable(problem), add_special_tokens=False)["input_ids"]:
            fix = "Write it as the run's problems are written (twig show RUN)"
            raise UserError("--prompt", "the model's tokenizer knows none of its letters", fix)
        ids = encode_prompt(self.task, Example(problem, {}), self.tokenizer)
        refuse_too_long(self.task, len(ids), self.policy.context_length)
        rows = vocabulary_of(self.policy.model)
        if int(ids.max()) >= rows:
            problem = f"it has a token that the model, which has {rows}, does not know"
            raise UserError("--prompt", problem, "Write it in other letters")
        return ids

    def answer(self, prompt_ids: np.ndarray, base: bool = False) -> Iterator[Token]:
        """Yields the greedy answer of the trained model, or of its base, token by token."""
        ending = Ending(self.params.end_ids, self.params.stop, self.params.decode, [prompt_ids[:0]])
        pieces = _Pieces(self.params.decode)
        longest = self.params.max_completion_length
        if self.policy.context_length is not None:
            longest = min(longest, self.policy.context_length - len(prompt_ids))
        texts: GrowingTexts | None = None
        for count in range(1, longest + 1):
            with torch.inference_mode(), self.policy.base() if base else nullcontext():
                if texts is None:
                    texts = self.policy.read([prompt_ids])
                else:
                    texts.extend(np.zeros(1, np.int64), np.array(pieces.ids[-1:]))
                logps = self._logps(texts)
            token = int(logps.argmax())
            pieces.add(token)
            ended = token in self.params.end_ids
            if self.params.stop:
                ended |= bool(ending.stopped(np.array([pieces.ids]), np.arange(1))[0])
            yield Token(token, pieces.text(ended or count == longest), float(logps[token].exp()))
            if ended:
                return

    @torch.inference_mode()
    def choices(self, prompt_ids: np.ndarray, answer: Sequence[int], num: int) -> list[Candidate]:
        """Returns the `num` most likely tokens after the beginning of an answer, of each model.

        The likeliest of the trained model comes first.
        """
        ids = np.concatenate([prompt_ids, np.array(answer, np.int64)])
        with self.policy.base():
            base = self._logps(self.policy.read([ids])).exp()
        trained = self._logps(self.policy.read([ids])).exp()
        likely = {int(i) for values in (base, trained) for i in values.topk(min(num, len(values))).indices}
        order = sorted(likely, key=lambda i: -float(trained[i]))
        return [Candidate(self.token_text(i), float(base[i]), float(trained[i])) for i in order]

    def token_text(self, token: int) -> str:
        """Returns the text of one token, special ones too."""
        return str(self.tokenizer.decode([token]))

    def _logps(self, texts: GrowingTexts) -> Float[Tensor, " V"]:
        """Returns the log-probabilities of the next token, as it would be sampled."""
        logps = torch.log_softmax(self.policy.sampled_logits(texts.logits), -1)[0]
        if not bool(torch.isfinite(logps.max())):
            problem = "the model's probabilities are not finite"
            raise UserError("model.dtype", problem, "Set model.dtype=float32")
        return logps


class _Pieces:
    """Decodes an answer piece by piece: only its end is decoded again for each token."""

    def __init__(self, decode: Decode) -> None:
        self.decode, self.ids = decode, list[int]()
        self._before = self._shown = 0  # where decoding starts, and how many ids are in the texts so far

    def add(self, token: int) -> None:
        self.ids.append(token)

    def text(self, last: bool) -> str:
        """Returns the text that the tokens add since the last one that was returned."""
        before = self._text(self._before, self._shown)
        text = self._text(self._before, len(self.ids))
        if text.endswith(_INCOMPLETE) and not last:
            return ""
        self._before, self._shown = self._shown, len(self.ids)
        return text[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self.decode([np.array(self.ids[start:end], np.int64)])[0]
