"""Attention over shared parts against one softmax over all keys, and waves over both caches."""

import numerics
import numpy as np
import pytest
import tiny
import torch
from gradients import texts_of
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numerics import assert_same_text

from twig.engine import wave_cache
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.shared_attention import Groups, KeyPart, attend_parts
from twig.engine.wave_cache import CopiedPrompts, SharedPrompts, why_not_shared


def by_loops(query, key, value, parts, scaling, softcap, sinks):
    """One softmax for each row and head over the keys of all parts."""
    rows, heads, _, size = query.shape
    out = query.new_zeros(rows, 1, heads, value[0].shape[-1])
    for row in range(rows):
        for head in range(heads):
            scores, values = [], []
            for k, v, part in zip(key, value, parts, strict=True):
                table = (
                    row if part.groups is None else int(part.groups.place[row]) // part.groups.rows.shape[1]
                )
                kind = head // (heads // k.shape[1])
                score = k[table, kind] @ query[row, head, 0] * scaling
                score = score if softcap is None else torch.tanh(score / softcap) * softcap
                if part.mask is not None:
                    score = score + part.mask[min(table, len(part.mask) - 1)]
                scores.append(score)
                values.append(v[table, kind])
            if sinks is not None:
                scores.append(sinks[head : head + 1])
                values.append(torch.zeros_like(values[0][:1]))
            out[row, 0, head] = torch.softmax(torch.cat(scores), 0) @ torch.cat(values)
    return out


@examples(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_parts_are_merged_into_one_softmax(of_row, softcap, with_sinks, with_common, seed):
    torch.manual_seed(seed)
    rows, prompts = len(of_row), 3

    def tables(count, length):
        return torch.randn(count, 2, length, 8, dtype=torch.float64)

    mask = torch.zeros(prompts, 5, dtype=torch.float64)
    mask[0, 3:] = mask[2, :] = float("-inf")  # one prompt is out of sight
    own = torch.zeros(1, 4, dtype=torch.float64)
    own[0, 0] = float("-inf")
    parts = [KeyPart(Groups.of(np.array(of_row), prompts, torch.device("cpu")), mask), KeyPart(None, own)]
    sizes = [(prompts, 5), (rows, 4)]
    if with_common:
        parts.insert(0, KeyPart(Groups.of(np.zeros(rows, np.int64), 1, torch.device("cpu")), None))
        sizes.insert(0, (1, 6))
    key, value = ([tables(*size) for size in sizes] for _ in range(2))
    query = torch.randn(rows, 4, 1, 8, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    options = {"scaling": 0.7, "softcap": softcap}
    ours, _ = attend_parts(torch.nn.Module(), query, key, value, parts, s_aux=sinks, **options)
    torch.testing.assert_close(ours, by_loops(query, key, value, parts, 0.7, softcap, sinks))


def prompts_of(lengths, alike=0):
    draw = np.random.default_rng(3)
    common = draw.integers(3, tiny.VOCAB, alike)
    return [np.concatenate([common, draw.integers(3, tiny.VOCAB, n - alike)]) for n in lengths]


CASES = {
    "lengths": prompts_of([4, 9, 2]),
    "one length": prompts_of([5, 5]),
    "alike": prompts_of([20, 18, 23], alike=17),
    "one prompt": prompts_of([6]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2-window", "gemma2", "gemma3", "mistral"])
def test_waves_over_shared_and_over_copied_prompts_draw_the_same(family, case):
    """Windows end inside a prompt, between two prompts' ends, and among a completion's own tokens."""
    policy = tiny.build_policy(family, "sdpa" if tiny.has_sdpa(family) else "eager")
    assert policy.sharing_refusal is None
    requests = [
        Request(ids, num, 9, slot)
        for slot, (ids, num) in enumerate(zip(CASES[case], (5, 1, 3), strict=False))
    ]
    params = SamplingParams([5, 6], texts_of, seed=1)
    with numerics.casts():
        shared = sample(policy, requests, params)
        policy.sharing_refusal = "of a test"
        copied = sample(policy, requests, params)
    lengths = iter(assert_same_text(policy, requests, shared.completions, copied.completions, 1))
    for ours, theirs in zip(shared.completions, copied.completions, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            inside = slice(0, max(next(lengths) - 1, 0))
            numerics.assert_values(a.logps[inside], b.logps[inside])
            numerics.assert_hidden(shared.boundary[a.cells[inside]], copied.boundary[b.cells[inside]])
    for a, b in zip(shared.prompt_cells, copied.prompt_cells, strict=True):
        numerics.assert_hidden(shared.boundary[a], copied.boundary[b])


@pytest.mark.parametrize(("tokens", "kind"), [(15, CopiedPrompts), (16, SharedPrompts)])
def test_short_prompts_are_copied(tokens, kind, monkeypatch):
    monkeypatch.setattr(wave_cache, "HELD_FROM", 16)
    opened, policy = [], tiny.build_policy()
    original = kind._open
    monkeypatch.setattr(kind, "_open", lambda *args: opened.append(kind) or original(*args))
    requests = [Request(ids, 2, 3, slot) for slot, ids in enumerate(prompts_of([4, tokens]))]
    sample(policy, requests, SamplingParams([5, 6], texts_of, seed=1))
    assert opened == [kind]


@torch.no_grad()
def test_what_all_prompts_begin_with_is_held_once():
    decoder = tiny.build_policy().decoder
    texts = SharedPrompts(decoder, decoder.trunk(2), CASES["alike"], 9, 4)
    assert texts.common == 17
    assert [part[0][0].shape[::2] for part in texts.cache.before] == [(1, 17), (3, 23 - 17)]
    whole = CopiedPrompts(decoder, decoder.trunk(2), CASES["alike"], 9, 4)
    for row, ids in enumerate(CASES["alike"]):
        numerics.assert_hidden(texts.boundary[row, : len(ids)], whole.boundary[row, : len(ids)])
    numerics.assert_hidden(texts.hidden, whole.hidden)
    windowed = tiny.build_policy("mistral").decoder
    assert SharedPrompts(windowed, windowed.trunk(2), CASES["alike"], 9, 4).common == 0, (
        "its window ends there"
    )


def test_a_model_whose_attention_is_not_transformers_copies_prompts(monkeypatch):
    decoder = tiny.build_policy().decoder
    assert why_not_shared(decoder) is None

    def unseen(self, t, of_prompt):
        return dict.fromkeys(self.decoder.windows, (KeyPart(None, None),) * 2)

    monkeypatch.setattr(SharedPrompts, "_masks", unseen)
    assert "cannot be called" in why_not_shared(decoder)
    monkeypatch.undo()
    original = wave_cache.SharedPrompts._masks

    def swapped(self, t, of_prompt):
        return original(self, t, 1 - of_prompt)

    monkeypatch.setattr(SharedPrompts, "_masks", swapped)
    assert "differ by" in why_not_shared(decoder)


@pytest.mark.parametrize("kind", [SharedPrompts, CopiedPrompts])
@pytest.mark.parametrize("alike", [0, 16], ids=["", "common beginning"])
def test_prompts_read_in_parts_are_what_they_are_at_once(kind, alike, monkeypatch):
    policy, prompts = tiny.build_policy(), prompts_of([19, 24, 18, 21, 20], alike)
    together, read, embed = {}, [], policy.decoder.embed
    monkeypatch.setattr(policy.decoder, "embed", lambda ids: read.append(ids.numel()) or embed(ids))
    for tokens in (10_000, 30):
        monkeypatch.setattr(wave_cache, "READ_AT_ONCE", tokens)
        with torch.inference_mode():
            together[tokens] = kind(policy.decoder, policy.trunk, prompts, 5, 3)
        assert (max(read) <= 30) == (tokens == 30) and sum(read) <= 5 * 24 + alike
        read.clear()
    whole, parts = together.values()
    numerics.assert_hidden(parts.hidden, whole.hidden)
    numerics.assert_hidden(parts.boundary, whole.boundary)
    for ours, theirs in zip(parts.cache.before, whole.cache.before, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            for a, b in zip(one, other, strict=True):
                numerics.assert_hidden(a, b)
    buffers = [(*each.cache.keys, *each.cache.values) for each in (parts, whole)]
    for a, b in zip(*buffers, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            numerics.assert_hidden(a[:, :, : parts.width], b[:, :, : parts.width])


def test_whether_prompts_are_shared_is_found_without_the_adapter(monkeypatch):
    """A run begins with an adapter that changes nothing; whoever loads its result takes the same path."""
    policy, ids, found = tiny.build_policy(), torch.arange(6)[None], []

    @torch.no_grad()
    def logits(decoder):
        return decoder.model(input_ids=ids).logits

    monkeypatch.setattr("twig.engine.policy.why_not_shared", lambda decoder: found.append(logits(decoder)))
    loaded = Policy(policy.peft_model, decode="plain")
    assert not torch.equal(found[0], logits(loaded.decoder))
    with loaded.base():
        assert torch.equal(found[0], logits(loaded.decoder))


@pytest.mark.parametrize("question", ["_choose_reading", "_can_choose_rows"])
def test_the_plain_engine_decides_without_the_adapter(question, monkeypatch):
    policy, found = tiny.build_policy(engine="plain"), []
    original = getattr(PlainPolicy, question)
    monkeypatch.setattr(
        PlainPolicy, question, lambda self, ids: found.append(self.adapter_is_on) or original(self, ids)
    )
    loaded = PlainPolicy(policy.peft_model)
    assert found == [False] and loaded.adapter_is_on
