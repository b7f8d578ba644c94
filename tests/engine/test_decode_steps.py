"""Decode steps over fixed buffers against the plain loop, without a device that could capture them."""

from itertools import product

import numpy as np
import pytest
import tiny
import torch

from twig.engine import decode_graph
from twig.engine.decode_graph import DecodeSteps, StepShape
from twig.engine.inverse_cdf import invert, invert_in_blocks
from twig.engine.sampler import Request, SamplingParams, sample

FAMILIES = {name: "eager" for name in tiny.FAMILIES | tiny.MORE_FAMILIES}
FAMILIES |= {name: "sdpa" for name in FAMILIES if tiny.has_sdpa(name)}


def texts_of(rows):
    return [" ".join(map(str, ids)) for ids in rows]


def requests_of(num=5, lengths=(4, 7, 3), limits=(9, 12, 7)):
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(3, tiny.VOCAB, length), num, limit, slot)
        for slot, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def policy_of(family="qwen2", attention="sdpa", decode="graph", **options):
    modules = ["qkv_proj"] if family.startswith("phi3") else ["q_proj", "v_proj"]
    policy = tiny.build_policy(family, attention, target_modules=modules, **options)
    policy.decode = decode
    return policy


def drawn_by(policy, requests, on_finished=None, **options):
    params = SamplingParams([5, 6], texts_of, seed=3, **options)
    return sample(policy, requests, params, step=2, on_finished=on_finished)


def assert_same(ours, theirs):
    """Equal tokens, and log-probs, entropies and boundary to 1e-9."""
    lengths = set()
    for actual, expected in zip(ours.completions, theirs.completions, strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert (a.finished, a.text) == (b.finished, b.text)
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-9)
            np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-9)
            lengths.add(len(a))
            if ours.boundary is not None:
                same = ours.boundary[a.cells[:-1]], theirs.boundary[b.cells[:-1]]
                torch.testing.assert_close(*same, rtol=0, atol=1e-9)
    for a, b in zip(ours.prompt_cells, theirs.prompt_cells, strict=True):
        if ours.boundary is not None:
            torch.testing.assert_close(ours.boundary[a], theirs.boundary[b], rtol=0, atol=1e-9)
    return lengths


@pytest.fixture(autouse=True)
def _float64():
    with tiny.Float64():
        yield


# The first family in both ways, those whose layers differ in one, the rest in the slow tier.
QUICK = {("qwen2", False), *((family, True) for family in ("qwen2", "gemma2", "gemma3", "granite", "phi3"))}


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(FAMILIES, (True, False))
    ],
)
def test_steps_give_the_tokens_logps_and_boundary_of_the_plain_loop(family, shared, monkeypatch):
    monkeypatch.setattr(decode_graph, "_SHARE_FROM", 0 if shared else 1e9)
    policy = policy_of(family, FAMILIES[family], layers=[2, 3], temperature=1.3, suppress_tokens=[0, 4])
    ours = drawn_by(policy, requests_of())
    assert policy.decode_refusal is None
    assert [key[0].shared for key in policy.decode_steps.steps] == [shared]
    policy.decode = "plain"
    assert len(assert_same(ours, drawn_by(policy, requests_of()))) > 3, "rows must end at different steps"


@pytest.mark.parametrize("wave_size", [1, 4, 7])
def test_waves_cut_groups_and_share_buffers(wave_size, monkeypatch):
    monkeypatch.setattr(decode_graph, "_SLOTS", 1)
    policy, requests = policy_of(layers=[2, 3]), requests_of()
    ours = drawn_by(policy, requests, wave_size=wave_size)
    assert 1 <= len(policy.decode_steps.steps) <= 2
    policy.decode = "plain"
    assert_same(ours, drawn_by(policy, requests))


def test_buffers_of_an_earlier_wave_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(decode_graph, "_SLOTS", 1)
    policy = policy_of(layers=[2, 3])
    long = requests_of(lengths=(9, 11, 10), limits=(20, 20, 20))
    drawn_by(policy, long)
    (step,) = policy.decode_steps.steps.values()
    ours = drawn_by(policy, requests_of())
    assert list(policy.decode_steps.steps.values()) == [step], "both fit the same buffers"
    policy.decode = "plain"
    assert_same(ours, drawn_by(policy, requests_of()))


def test_greedy_answers_and_the_base_model_have_steps_of_their_own():
    policy, requests = policy_of(), requests_of(num=1)
    for options in ({"greedy": True, "record": False}, {"record": False}):
        ours = drawn_by(policy, requests, **options)
        with policy.base():
            base = drawn_by(policy, requests, **options)
        policy.decode = "plain"
        assert_same(ours, drawn_by(policy, requests, **options))
        with policy.base():
            assert_same(base, drawn_by(policy, requests, **options))
        policy.decode = "graph"
    assert [c.ids.tolist() for (c,) in ours.completions] != [c.ids.tolist() for (c,) in base.completions]


def test_an_updated_adapter_is_the_one_that_samples():
    policy, requests = policy_of(), requests_of()
    before = drawn_by(policy, requests)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += 0.5 * ("lora_B" in name)
    ours = drawn_by(policy, requests)
    policy.decode = "plain"
    assert_same(ours, drawn_by(policy, requests))
    assert any(
        a.ids.tolist() != b.ids.tolist()
        for left, right in zip(before.completions, ours.completions, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def test_stop_texts_take_the_plain_loop():
    policy = policy_of()
    drawn_by(policy, requests_of(), stop=["7"])
    assert policy.decode_steps is None or not policy.decode_steps.steps


@pytest.mark.parametrize("wave_size", [128, 4])
@pytest.mark.parametrize(("engine", "decode"), [("trie", "graph"), ("trie", "plain"), ("plain", "plain")])
def test_progress_adds_up_to_the_completions(engine, decode, wave_size):
    finished, requests = [], requests_of(limits=(30, 25, 20))
    policy = policy_of(engine=engine, decode=decode)
    drawn_by(policy, requests, finished.append, wave_size=wave_size)
    assert sum(finished) == 15 and min(finished) > 0
    assert len(finished) > (2 if wave_size == 128 else 4), "more than once a wave"


@pytest.mark.parametrize(("engine", "decode"), [("trie", "graph"), ("trie", "plain"), ("plain", "plain")])
def test_progress_is_made_while_no_completion_has_ended(engine, decode):
    """Without an end token all of a wave end together, at the limit: they are done little by little."""
    finished, params = [], SamplingParams([], texts_of, seed=3)
    policy, requests = policy_of(engine=engine, decode=decode), requests_of(limits=(20, 20, 20))
    drawn = sample(policy, requests, params, on_finished=finished.append)
    assert all(len(each) == 20 for group in drawn.completions for each in group)
    assert sum(finished) == 15 and max(finished) < 15 and len(finished) > 2


def test_progress_of_a_wave_that_is_repeated_counts_once(monkeypatch):
    policy, finished = policy_of(decode="plain"), []
    own, calls = policy.next_token_logits, []

    def fails_once(hidden):
        calls.append(1)
        if len(calls) == 8:
            assert finished, "rows must have finished before memory runs out"
            raise torch.OutOfMemoryError("full")
        return own(hidden)

    monkeypatch.setattr(policy, "next_token_logits", fails_once)
    drawn = drawn_by(policy, requests_of(limits=(30, 25, 20)), finished.append)
    assert drawn.wave_size == 7 and sum(finished) == 15


def test_layers_that_cannot_take_such_a_cache_take_the_plain_loop(monkeypatch):
    def touches(module, query, key, value, mask, **kwargs):
        return key.shape

    monkeypatch.setattr(decode_graph, "attend", touches)
    monkeypatch.setattr(decode_graph, "_ATTENTION", "twig_decode_that_fails")
    policy = policy_of()
    ours = drawn_by(policy, requests_of())
    assert "cannot be called with such a cache" in policy.decode_refusal
    assert policy.decode == "plain"
    assert_same(ours, drawn_by(policy, requests_of()))


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), torch.OutOfMemoryError("full")])
def test_a_step_that_cannot_be_captured_falls_back_one_way_at_a_time(error, monkeypatch):
    ways = []

    def fails(step):
        ways.append(step.policy.decode)
        raise error

    monkeypatch.setattr(decode_graph.DecodeStep, "_captured", fails)
    policy, requests = policy_of(decode="compiled"), requests_of()
    ours = drawn_by(policy, requests)
    assert policy.decode == "plain" and ways[-2:] == ["compiled", "graph"]
    assert policy.decode_refusal == (
        "memory ran out" if "full" in str(error) else "RuntimeError: no compiler"
    )
    assert_same(ours, drawn_by(policy, requests))


def test_steps_that_are_not_the_own_forward_are_refused(monkeypatch):
    def wrong(module, query, key, value, mask, **kwargs):
        return attend(module, query, key, value, torch.zeros_like(mask), **kwargs)

    attend = decode_graph.attend
    monkeypatch.setattr(decode_graph, "attend", wrong)
    monkeypatch.setattr(decode_graph, "_ATTENTION", "twig_decode_that_sees_too_much")
    with pytest.raises(ValueError, match="differ by .* of their size"):
        DecodeSteps(policy_of())


def test_shapes_are_rounded_up_to_few():
    def of(*sizes):
        shape = StepShape(*sizes).rounded()
        return shape.prompts, shape.rows, shape.slots, shape.length

    assert of(1, 8, 100, 256) == (1, 8, 128, 256)
    assert of(5, 3, 64, 65) == (6, 3, 64, 128)
    assert [of(n, 1, 1, 1)[0] for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 16]


def test_one_set_of_buffers_serves_shorter_waves_and_makes_way_for_longer_ones(monkeypatch):
    monkeypatch.setattr(decode_graph, "_SLOTS", 1)
    steps = DecodeSteps(policy_of())
    end = torch.tensor([5])
    middle = steps.get(StepShape(4, 3, 10, 8), end)
    assert (
        steps.get(StepShape(2, 3, 7, 8), end) is middle and steps.get(StepShape(3, 3, 10, 1), end) is middle
    )
    fewer = steps.get(StepShape(1, 3, 10, 8), end)
    assert fewer is not middle and len(steps.steps) == 2, "most rows would run for nothing"
    longer = steps.get(StepShape(4, 3, 11, 8), end)
    assert middle not in steps.steps.values() and steps.get(StepShape(4, 3, 10, 8), end) is longer
    assert steps.get(StepShape(1, 3, 10, 8), end) is fewer
    assert steps.get(StepShape(4, 3, 11, 8), torch.tensor([6])) is not longer
    assert steps.get(StepShape(4, 3, 11, 8, greedy=True), end) is not longer and len(steps.steps) == 1


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 23, 64, 1000])
def test_drawing_in_blocks_is_drawing(vocabulary):
    rng = np.random.default_rng(vocabulary)
    table = rng.random((40, vocabulary)) ** 6
    table[:, rng.random(vocabulary) < 0.3] = 0.0
    table[:, -1] += table.sum(-1) == 0
    probabilities = torch.from_numpy(table / table.sum(-1, keepdims=True))
    uniform = torch.from_numpy(np.concatenate([rng.random(38), [0.0, 1 - 2**-53]]))
    tokens = invert_in_blocks(probabilities, uniform)
    assert tokens.tolist() == invert(probabilities, uniform).tolist()
    assert bool((probabilities.gather(1, tokens[:, None]) > 0).all())


def test_drawing_in_blocks_in_float32_never_takes_what_cannot_be():
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.random((2000, 5003)) ** 20).float()
    table[:, ::3] = 0.0
    probabilities = table / table.sum(-1, keepdim=True)
    edges = torch.tensor([0.0, 1e-30, 0.5, 1.0]).repeat(500)
    for uniform in (torch.from_numpy(rng.random(2000)).float(), edges):
        tokens = invert_in_blocks(probabilities, uniform)
        assert bool((probabilities.gather(1, tokens[:, None]) > 0).all())
        # in float32 a draw may land beside the token of the exact sums, not farther than rounding
        exact = probabilities.double().cumsum(-1)
        below = torch.cat([exact.new_zeros(2000, 1), exact], 1).gather(1, tokens[:, None])[:, 0]
        above = exact.gather(1, tokens[:, None])[:, 0]
        assert bool((below - 1e-5 <= uniform).all() and (uniform <= above + 1e-5).all())
