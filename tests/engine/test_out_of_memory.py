"""Memory that runs out, wherever it does: the same tokens and the same gradient, in smaller pieces."""

from contextlib import nullcontext

import numerics
import pytest
import tiny
import torch
from gradients import credit_of, groups_of, requests_of, scored, texts_of
from numerics import assert_hidden, assert_same, assert_same_text, assert_values
from running_out import Heard, gradient_of

from twig.common.errors import UserError
from twig.config.sizes import Sizes
from twig.engine.decoder import Decoder, _trim_behind
from twig.engine.kv_cache import KeyValueCache
from twig.engine.lm_head import Head
from twig.engine.pack import build_packs, halves
from twig.engine.policy import Policy
from twig.engine.sampler import SamplingParams, sample
from twig.engine.wave_cache import SharedPrompts
from twig.runtime.memory_use import out_of_memory

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"
)
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.fixture(autouse=True)
def _float64(request):
    with nullcontext() if "float32" in request.function.__name__ else numerics.casts():
        yield


def break_at(monkeypatch, owner, name, expected, error=None, when=lambda *args: True):
    """Makes one call of a method, number `wanted`, fail for want of memory; returns the list of calls."""
    own, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        if when(*args):
            calls.append(1)
            if len(calls) == expected:
                raise error or torch.OutOfMemoryError("out of memory")
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), CPU, MPS, CUBLAS, MemoryError()], ids=repr)
def test_what_running_out_of_memory_looks_like(error):
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError()]
)
def test_and_what_does_not(error):
    assert not out_of_memory(error)


def test_an_error_that_follows_from_it_is_one_too():
    """So a capture ends if memory runs out in it."""

    def raised(cause, error):
        try:
            try:
                raise cause
            finally:
                raise error
        except Exception as actual:
            return actual

    assert out_of_memory(raised(torch.OutOfMemoryError("x"), RuntimeError("capture was invalidated")))
    assert not out_of_memory(raised(ValueError("x"), RuntimeError("capture was invalidated")))
    assert not out_of_memory(raised(torch.OutOfMemoryError("x"), UserError("train.pack_size", "too small")))


# ---- sampling ----------------------------------------------------------------------------------------------

SAMPLING = {
    "prompts": (Decoder, "run", [1, 2]),
    "a cache of the completions": (KeyValueCache, "update", [1, 5]),
    "a branch that splits": (KeyValueCache, "copy_rows", [1, 2, 4]),
    "a token": (Decoder, "run", [3, 4, 7, 20]),
    "logits": (Policy, "next_token_logits", [1, 2, 6]),
    "masks": (SharedPrompts, "_masks", [1, 5]),
}


@pytest.mark.parametrize("wave_size", [128, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        # the first call of each, and the last token; the rest is slow
        pytest.param(where, call, marks=() if call in (calls[0], 20) else pytest.mark.slow)
        for where, (*_, calls) in SAMPLING.items()
        for call in calls
    ],
)
def test_sampling_goes_on_with_half_as_many_and_the_same_noise(where, call, wave_size, monkeypatch):
    policy, requests = tiny.build_policy(), requests_of()

    def draw():
        return sample(policy, requests, SamplingParams([5, 6], texts_of, seed=1, wave_size=wave_size), step=2)

    whole = draw()
    calls = break_at(monkeypatch, *SAMPLING[where][:2], call)
    again = draw()
    assert len(calls) > call, "it must have failed and gone on"
    assert again.wave_size == min(wave_size, 15) // 2 and whole.wave_size == wave_size
    lengths = iter(assert_same_text(policy, requests, again.completions, whole.completions, 1, 2))
    for a, b in zip(again.completions, whole.completions, strict=True):
        for left, right in zip(a, b, strict=True):
            same = next(lengths)
            assert left.finished == right.finished or same < len(left)
            assert_values(left.logps[:same], right.logps[:same], bound=1e-10)
            # what comes after the last token was never run
            inside = slice(0, min(same, len(left) - 1))
            assert_hidden(again.boundary[left.cells[inside]], whole.boundary[right.cells[inside]])
    for left, right in zip(again.prompt_cells, whole.prompt_cells, strict=True):
        assert_hidden(again.boundary[left], whole.boundary[right])


def test_one_completion_that_does_not_fit_is_an_error(monkeypatch):
    policy, calls = tiny.build_policy(), []

    def full(*args, **kwargs):
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Decoder, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(policy, requests_of(), SamplingParams([5], texts_of))
    assert len(calls) == 4, "15, 7, 3 and 1 at once"


def test_another_error_is_not_repeated(monkeypatch):
    policy = tiny.build_policy()
    calls = break_at(monkeypatch, Decoder, "run", 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        sample(policy, requests_of(), SamplingParams([5], texts_of))
    assert len(calls) == 3


# ---- the update --------------------------------------------------------------------------------------------


def batch_of(beta=0.0):
    groups = groups_of(count=3)
    return (groups, *credit_of(groups, beta=beta))


UPDATE = {
    "the trunk": (Decoder, "run", [1, 2], lambda *args: not torch.is_grad_enabled()),
    "the upper layers": (Decoder, "run", [1, 2], lambda *args: torch.is_grad_enabled()),
    "the head": (Head, "logits", [1, 2], lambda *args: True),
    "the backward pass": (torch.autograd, "grad", [1, 2], lambda *args: True),
}


@pytest.mark.parametrize(("beta", "old"), [(0.1, True), pytest.param(0.0, False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("where", "call"), [(where, call) for where, (*_, calls, _) in UPDATE.items() for call in calls]
)
def test_an_update_goes_on_in_smaller_packs(where, call, beta, old, monkeypatch):
    beta = min(beta, numerics.now().beta)
    policy, batch = tiny.build_policy(), batch_of(beta)
    whole, first = gradient_of(policy, batch, beta=beta, old=old)
    owner, name, _, when = UPDATE[where]
    calls = break_at(monkeypatch, owner, name, call, when=when)
    heard, sizes = Heard(), Sizes(128, 64, 2**22, False)
    again, passes = gradient_of(policy, batch, sizes, heard, beta, old)
    assert len(calls) > call, "it must have failed and gone on"
    assert len(passes.packs) > len(first.packs) and passes.sizes.pack_size < 64
    (said,) = heard.said
    assert f"train.pack_size={passes.sizes.pack_size}" in said
    assert_same(again, whole, bound=1e-10)


def test_a_single_path_is_run_with_checkpointed_layers_then_with_a_smaller_head_then_refused(monkeypatch):
    policy, batch = tiny.build_policy(), batch_of()
    monkeypatch.setattr("twig.engine.update._SMALLEST_HEAD_CHUNK", 2**18)
    heard, sizes, tries = Heard(), Sizes(128, 1, 2**22, False), []

    def full(pack, *args):
        tries.append((policy.checkpoint_layers, policy.head_chunk))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(policy, "backward", full)
    with pytest.raises(UserError, match=r"memory: \d+ tokens, .*rollout\.max_completion_length"):
        gradient_of(policy, batch, sizes, heard)
    assert tries == [(False, 2**22), (True, 2**22), (True, 2**20), (True, 2**18)]
    changes = ("train.checkpoint_layers=true", "train.head_chunk=1048576", "train.head_chunk=262144")
    assert all(change in said for change, said in zip(changes, heard.said, strict=True))


@pytest.mark.parametrize("call", [1, 3])
def test_a_stem_that_cannot_be_opened_is_opened_for_smaller_packs(call, monkeypatch):
    policy, batch = tiny.build_policy(), batch_of()
    sizes, heard = Sizes(128, 20, 2**22, False), Heard()
    whole, first = gradient_of(policy, batch, sizes)
    assert len({pack.stem.group for pack in first.packs if pack.stem}) == 3
    calls = break_at(monkeypatch, policy, "open_stem", call)
    again, passes = gradient_of(policy, batch, sizes, heard)
    assert len(calls) > call and "train.pack_size=" in heard.said[0]
    assert passes.sizes.pack_size < 20
    assert_same(again, whole, bound=1e-10)


@pytest.mark.parametrize("call", [1, 3])
def test_a_stem_that_cannot_be_closed_is_closed_with_checkpointed_layers_in_float32(call, monkeypatch):
    policy, batch = tiny.build_policy(dtype=numerics.now().rerun), batch_of()
    sizes, heard = Sizes(128, 20, 2**22, False), Heard()
    whole, _ = gradient_of(policy, batch, sizes)
    calls = break_at(monkeypatch, policy, "close_stem", call)
    again, passes = gradient_of(policy, batch, sizes, heard)
    assert len(calls) > call and len(heard.said) == 1 and passes.sizes.checkpoint_layers
    assert_same(again, whole, bound=1e-12)


def test_a_stem_that_never_fits_is_refused(monkeypatch):
    policy, batch = tiny.build_policy(), batch_of()
    calls = []

    def full(*args):
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(policy, "close_stem", full)
    with pytest.raises(UserError, match=r"memory: \d+ tokens, .*rollout\.max_completion_length"):
        gradient_of(policy, batch, Sizes(128, 9, 2**22, False))
    assert len(calls) == 2, "once more with checkpointed layers"


def test_halves_have_the_same_targets_once_each():
    groups, tries, credits = batch_of()
    (pack,) = build_packs(scored(groups, tries, credits), 4096)
    parts = halves(pack, scored(groups, tries, credits))
    assert len(parts) > 1 and max(part.ids.size for part in parts) <= pack.ids.size // 2
    every = [
        (g, n, w)
        for part in parts
        for g, n, w in zip(part.targets.group, part.targets.node, part.targets.plus, strict=True)
    ]
    expected = list(zip(pack.targets.group, pack.targets.node, pack.targets.plus, strict=True))
    assert sorted(every) == sorted(expected)


# What is freed between layers


def test_the_size_of_a_pack_whose_layers_give_back_is_in_numbers_not_bytes(monkeypatch):
    """What a layer computes in between is float32, whatever goes in."""
    calls = []
    monkeypatch.setattr("twig.engine.decoder.trim_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr("twig.engine.decoder._TRIMMED_FROM", 6)
    for dtype in (torch.bfloat16, torch.float32):
        _trim_behind(torch.zeros(2, 3, dtype=dtype), 1)
        _trim_behind(torch.zeros(5, dtype=dtype), 1)
    assert len(calls) == 2


def test_a_layer_that_is_trained_gives_back_what_it_freed(monkeypatch):
    """In each layer of a large pack forward, in some backward; nothing does without a gradient."""
    calls = []
    monkeypatch.setattr("twig.engine.decoder.trim_freed_memory", lambda: calls.append(1))
    policy, batch = tiny.build_policy(layers="all"), batch_of()
    whole, _ = gradient_of(policy, batch)
    assert not calls  # small packs do not
    monkeypatch.setattr("twig.engine.decoder._TRIMMED_FROM", 0)
    monkeypatch.setattr("twig.engine.decoder._TRIMMED_EVERY", 10**6)
    _, passes = gradient_of(policy, batch)
    forward = len(calls)
    # the last layer runs at the head's columns only, elsewhere
    assert forward >= len(passes.packs) * (policy.num_layers - 1 - policy.cut) > len(passes.packs) > 0
    calls.clear()
    monkeypatch.setattr("twig.engine.decoder._TRIMMED_EVERY", 1)
    again, _ = gradient_of(policy, batch)
    assert len(calls) == 2 * forward
    assert_same(again, whole)
    calls.clear()
    passes.logps()
    assert not calls
