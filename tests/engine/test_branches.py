"""Branches against a table of texts: every completion reads its own, and every text is there once."""

import numpy as np
import oracles
import pytest
import tiny
import torch
from gradients import texts_of
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from twig.core.branches import split
from twig.engine import kv_cache
from twig.engine.decoder import Decoder
from twig.engine.kv_cache import Buffers, KeyValueCache
from twig.engine.sampler import Request, SamplingParams, sample

_COMPLETIONS = st.lists(  # a prompt, and a text of at most six tokens
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1, max_size=12
)


@examples(max_examples=200, deadline=None)
@given(_COMPLETIONS)
def test_every_completion_reads_its_own_text_and_every_text_is_there_once(completions):
    prompts = sorted({prompt for prompt, _ in completions})
    rows = {place: [(prompt,)] for place, prompt in enumerate(prompts)}  # by row of a cache: what it holds
    unfinished = list(range(len(completions)))
    branch = np.array([prompts.index(prompt) for prompt, _ in completions])
    for t in range(6):
        going = np.array([len(completions[i][1]) > t for i in unfinished])
        unfinished = [i for i, goes in zip(unfinished, going, strict=True) if goes]
        if not unfinished:
            return
        step = split(branch[going], np.array([completions[i][1][t] for i in unfinished]))
        branch = step.branch
        assert not set(step.sources.tolist()) & set(step.targets.tolist())
        before = dict(rows)
        copied = {t: before[s] for s, t in zip(step.sources.tolist(), step.targets.tolist(), strict=True)}
        rows = before | copied
        parents = [before[p] for p in step.parents.tolist()]
        assert parents == [rows[row] for row in range(len(step.tokens))], "each continues its parent"
        for row, token in enumerate(step.tokens.tolist()):
            rows[row] = [*rows[row], token]
        own = [[(completions[i][0],), *completions[i][1][: t + 1]] for i in unfinished]
        assert [rows[row] for row in branch] == own
        assert len(step.tokens) == len({str(text) for text in own}), "no text twice"


def test_a_cache_begins_with_prompts_and_copies_its_rows():
    pairs = [tuple(torch.randn(2, 2, 2, 3, 4)) for _ in range(2)]
    cache = KeyValueCache.begun(pairs, 4, 5)
    cache.copy_rows(torch.tensor([1, 0]), torch.tensor([2, 3]))
    for layer, pair in enumerate(pairs):
        new = torch.randn(2, 4, 2, 1, 4)
        for both, before, after in zip(cache.update(*new, layer), pair, new, strict=True):
            assert torch.equal(both, torch.cat([before[[0, 1, 1, 0]], after], 2))


@pytest.mark.parametrize("record", [True, False])
def test_a_prefix_that_completions_share_is_run_once(record, monkeypatch):
    policy, run = tiny.build_policy(), []
    original = Decoder.embed

    def embed(self, ids):
        run.append(ids.numel())
        return original(self, ids)

    requests = [Request(np.arange(3, 3 + n), 12, 5, slot) for slot, n in enumerate((4, 2))]
    params = SamplingParams([1], texts_of, seed=2, record=record)
    monkeypatch.setattr(Decoder, "embed", embed)
    shared = sample(policy, requests, params)
    prefixes = {
        (slot, *c.ids[: t + 1].tolist())
        for slot, group in enumerate(shared.completions)
        for c in group
        for t in range(len(c.ids) - 1)
    }
    assert sum(run[1:]) == len(prefixes) < sum(len(c.ids) - 1 for g in shared.completions for c in g)
    monkeypatch.setattr("twig.engine.sampler.split", oracles.split_all)
    alone = sample(policy, requests, params)
    for ours, theirs in zip(shared.completions, alone.completions, strict=True):
        assert [c.ids.tolist() for c in ours] == [c.ids.tolist() for c in theirs]
        if record:
            assert shared.boundary is not None and alone.boundary is not None
            for a, b in zip(ours, theirs, strict=True):
                assert a.cells.tolist() == b.cells.tolist()
                torch.testing.assert_close(shared.boundary[a.cells[:-1]], alone.boundary[b.cells[:-1]])


def test_tables_of_a_shape_are_cut_from_one_block(monkeypatch):
    """No two overlap, and a block is at least as large as one table."""
    monkeypatch.setattr(kv_cache, "_BLOCK", 3 * 2 * 4 * 8)
    buffers, like = Buffers(4), torch.zeros(1, dtype=torch.float64)
    small = [buffers.table(2, like, 4) for _ in range(8)]
    large = [buffers.table(2, like.float(), 100) for _ in range(2)]
    for number, table in enumerate([*small, *large]):
        table.fill_(number)
    assert [table.unique().tolist() for table in [*small, *large]] == [[float(n)] for n in range(10)]
    assert {(table.shape, table.dtype) for table in small} == {((2, 4), torch.float64)}
    assert len({table.untyped_storage().data_ptr() for table in small}) == 3
    assert len({table.untyped_storage().data_ptr() for table in large}) == 2


def test_sampled_logits_leave_those_that_a_gradient_needs():
    policy = tiny.build_policy(temperature=2.0, suppress_tokens=[1])
    logits = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    sampled = policy.sampled_logits(logits)
    sampled[0, 2].backward()
    assert logits.tolist() == [[1.0, 2.0, 4.0]] and logits.grad.tolist() == [[0.0, 0.0, 0.5]]
    with torch.no_grad():
        plain = logits.clone()
        assert torch.equal(policy.sampled_logits(plain), sampled)
        assert sampled.tolist() == [[0.5, float("-inf"), 2.0]] and torch.equal(plain, sampled)
