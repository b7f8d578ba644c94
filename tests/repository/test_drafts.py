"""The benchmarks of speculation and FlexAttention: drafts replayed by hand, and block masks against dense
ones."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("drafts", "flex", "shapes", "common"):
        sys.modules.pop(name, None)


def _replay(scheme, texts, width, earlier=()):
    from drafts import SCHEMES, simulate

    noise = [np.full(64, 0.5) for _ in texts]
    return simulate(SCHEMES[scheme], [1, 2], texts, noise, width, earlier)


def test_rows_in_lock_step_learn_nothing_from_equal_prefixes():
    texts = [[5, 6, 7, 8]] * 3
    assert _replay("prefix", texts, 4).live == [3, 3, 3]


def test_an_earlier_wave_gives_a_pass_its_drafts_and_one_token():
    # after the first token, a pass gains 2 drafts and one token more: 7 tokens take 3 + 3 + 1
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    done = _replay("prefix, after an earlier wave", [text], 2, [text])
    assert (done.live, done.tokens) == ([1, 1, 1], 7)


def test_a_wrong_draft_gains_one_token():
    done = _replay("prefix, after an earlier wave", [[5, 6, 7, 8]], 3, [[5, 9, 7, 8]])
    assert done.live == [1, 1, 1]


def test_rows_learn_of_each_other_between_passes():
    # pass 1: both gain a token, and 6 has followed 5; pass 2: nothing has followed 6; the second row comes
    # to 5 again, drafts 6 in pass 4, and gains two
    done = _replay("siblings", [[5, 6, 7], [8, 5, 6, 9, 5, 6, 3]], 1)
    # row 2: 5 | draft 6 (row 1 had it in pass 1) + 9 | 5 | draft 6 + 3
    assert done.live == [2, 2, 1, 1]


def test_a_tree_of_drafts_holds_both_branches():
    earlier = [[5, 6, 1], [5, 7, 2]]
    done = _replay("siblings, after an earlier wave, tree", [[5, 7, 2]], 4, earlier)
    assert done.live == [1]


def test_block_masks_say_what_the_dense_masks_say():
    import flex

    actual = 0
    for generations, forks in ((8, "early"), (8, "late")):
        for size in (512, 1024):
            pack = flex.packs_of(generations, forks, size)[0]
            width, block = pack.ends.shape[1], flex.BLOCK
            columns, ends = flex.key_tables(pack, "cpu")
            mask = flex.block_mask(columns, ends, width)
            seen = flex.dense_mask(pack, torch.from_numpy(pack.ends), torch.float32)[:, 0] == 0
            at = torch.arange(width)
            inside = (columns <= at[:, None]) & (at[:, None] < ends[:, None])
            assert torch.equal(inside, seen)
            for kind in ("kv", "full_kv"):
                counts, order = (getattr(mask, f"{kind}_{name}") for name in ("num_blocks", "indices"))
                for row in range(counts.shape[2]):
                    for column in order[0, 0, row, : counts[0, 0, row]].tolist():
                        part = seen[0, row * block : (row + 1) * block, column * block : (column + 1) * block]
                        assert part.all() == (kind == "full_kv") and part.any()
                        seen[0, row * block : (row + 1) * block, column * block : (column + 1) * block] = (
                            False
                        )
                        actual += 1
            assert not seen.any()  # no block was left out
    assert actual
