"""What a step sampled, as rows of `completions/step-N.parquet`: texts, tokens, and the weight of each token.

Knows the columns of that file (`runlog.py` has their types) and how a tokenizer decodes; nothing of training.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from twig.trainer import Batch

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character yet


def completion_rows(batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    """The step's completions as rows of the completions file, with the weight that each token's node got."""
    weights = {}
    for group, trie, credit in zip(batch.rewarded, batch.tries, batch.credits, strict=True):
        for completion, path in zip(group.completions, trie.paths, strict=True):
            weights[id(completion)] = (credit.plus + credit.minus)[path]
    rows, n = [], 0
    for group in batch.groups:
        prompt, texts = tokenizer.decode(group.prompt_ids), _texts_after(group.prompt_ids, tokenizer.decode)
        for number, completion in enumerate(group.completions):
            reward = float(group.rewards[number])
            rows.append(
                {
                    "prompt_index": group.prompt_index,
                    "completion_index": number,
                    "prompt": prompt,
                    "completion": completion.text,
                    "prefix_length": group.prefix_length,
                    "token_ids": completion.ids.tolist(),
                    "tokens": texts(completion.ids.tolist()),
                    "logps": completion.logps.tolist(),
                    "entropies": completion.entropies.tolist(),
                    "weights": weights.get(id(completion), np.zeros(len(completion))).tolist(),
                    "finished": completion.finished,
                    "reward": None if np.isnan(reward) else reward,
                    "rewards": json.dumps({k: _number(v[n]) for k, v in batch.rewards.per_function.items()}),
                    "right": bool(batch.right[n]),
                }
            )
            n += 1
    return rows


def token_texts(
    prompt_ids: Sequence[int], ids: Sequence[int], decode: Callable[[list[int]], str]
) -> list[str]:
    """What each token of `ids` adds to the text after a prompt; laid end to end they are the decoded text.

    A token that ends inside a character adds "", the one that completes the character adds it whole.

    >>> token_texts([1], [2, 3], lambda ids: "".join("abcd"[i] for i in ids))
    ['c', 'd']
    """
    return _texts_after(prompt_ids, decode)(ids)


def _texts_after(
    prompt_ids: Sequence[int] | np.ndarray, decode: Callable[[list[int]], str]
) -> Callable[[Sequence[int]], list[str]]:
    # Decoding is not a sum over tokens: a first token may lose its space, and only together do bytes make a
    # character. So every token is decoded behind another one. What each adds there is nearly always what it
    # adds here, and is kept; where the sum is not the text, the text is decoded token by token.
    before = [int(prompt_ids[-1])]
    start, known = len(decode(before)), {}

    def alone(token: int) -> str:
        if token not in known:
            known[token] = decode([*before, token])[start:]
        return known[token]

    def texts(ids: Sequence[int]) -> list[str]:
        found = [alone(token) for token in ids]
        if "".join(found) == decode([*before, *ids])[start:] and _INCOMPLETE not in "".join(found):
            return found
        return _one_by_one(before, ids, decode)

    return texts


def _one_by_one(before: list[int], ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    found, shown = [], decode(before)
    for end in range(1, len(ids) + 1):
        text = decode([*before, *ids[:end]])
        if text.endswith(_INCOMPLETE) and end < len(ids):
            found.append("")  # what the bytes are is not known yet
            continue
        found.append(text[len(shown) :])
        shown = text
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
