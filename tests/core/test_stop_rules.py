"""Texts that end a completion: the same as cutting what is sampled without them, in every engine and wave."""

import numpy as np
import pytest
import tiny
import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from twig.core.stop_rules import Ending
from twig.engine.sampler import Request, SamplingParams, sample

# One token is a syllable of one to four bytes, some of them inside one another.
SYLLABLES = ["a", "b", "ab", "ba", "\n", "Q", "é", "\n\n", "aQ", "語"]
STOP = ["abQ", "\nb", "é語a"]


def text_of(ids) -> str:
    return "".join(SYLLABLES[i % len(SYLLABLES)] for i in ids)


def texts_of(rows):
    return [text_of(ids) for ids in rows]


def requests_of(count=4, num=12, prefix_length=0):
    rng = np.random.default_rng(5)
    return [
        Request(rng.integers(3, tiny.VOCAB, 6), num, 24, slot, prefix_length=prefix_length)
        for slot in range(count)
    ]


def shortest(ids, prefix=()):
    """A completion, cut behind the first token whose text so far has a stop text; and whether it was."""
    for stop in range(1, len(ids) + 1):
        text = text_of([*prefix, *ids[:stop]])
        if any(expected in text for expected in STOP):
            return ids[:stop].tolist(), True
    return ids.tolist(), False


@pytest.mark.parametrize("prefix_length", [0, 2])
@pytest.mark.parametrize("engine", ["trie", "plain"])
def test_a_completion_ends_with_the_token_that_completes_a_stop_text(engine, prefix_length):
    policy = tiny.build_policy(engine=engine, temperature=3.0)
    # a stop text that lies in the kept prefix from the start would be none of a replay's
    requests = [r for r in requests_of(prefix_length=prefix_length) if not _has_stop(r.prefix)]

    def draw(**options):
        return sample(policy, requests, SamplingParams([5], texts_of, seed=1, **options)).completions

    cut, straddling, whole = 0, 0, draw()
    for wave_size in (128, 5):
        drawn = draw(stop=STOP, wave_size=wave_size)
        for request, ours, theirs in zip(requests, drawn, whole, strict=True):
            for completion, reference in zip(ours, theirs, strict=True):
                ids, stopped = shortest(reference.ids, request.prefix)
                assert completion.ids.tolist() == ids
                assert completion.finished == (stopped or reference.finished)
                assert completion.text == text_of([*request.prefix, *ids]), "the stop text stays"
                np.testing.assert_allclose(completion.logps, reference.logps[: len(ids)], atol=1e-9)
                cut += len(ids) < len(reference.ids)
                straddling += stopped and not _has_stop(ids)
    assert cut > 5
    assert bool(straddling) == bool(prefix_length)


def _has_stop(ids) -> bool:
    return any(text in text_of(ids) for text in STOP)


def test_a_stop_text_is_found_where_transformers_finds_it(qwen2_tokenizer):
    """On a real byte-level tokenizer and pieces of text, against its own criterion for stop strings."""
    tokenizer = qwen2_tokenizer
    stop = ["\nQ:", "###", "é."]
    theirs = StopStringCriteria(tokenizer, stop)
    rng = np.random.default_rng(0)
    texts = [
        "\nQ:",
        "\n",
        "Q",
        ":",
        "Q:",
        "\n\n",
        "###",
        "##",
        "####",
        "#",
        "é",
        ".",
        "é.",
        "A\n",
        " a.",
        "12",
    ]
    pieces = sorted({i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)})
    rows = torch.from_numpy(rng.choice(pieces, (400, 6)))
    decode = lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)  # noqa: E731
    # without the rows in which one was there before the last token: those would have ended
    fresh = [not any(text in whole for text in stop) for whole in decode(list(rows[:, :-1].numpy()))]
    rows = rows[torch.tensor(fresh)]
    ending = Ending([], stop, decode, [np.empty(0, np.int64)] * len(rows))
    ours = ending.stopped(rows.numpy(), np.arange(len(rows)))
    assert 3 < int(ours.sum()) < len(rows)
    assert ours.tolist() == theirs(rows, None).tolist()
