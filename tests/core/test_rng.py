"""The noise of sampling: a function of its names only, uniform, and turned into tokens without error.

The twins are Philox-4x64-10 written out in Python integers, and a loop over the vocabulary in exact
fractions.
"""

import itertools
from fractions import Fraction

import numerics
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_groups import bounded

from twig.core.rng import CREDIT, DATA, REPLAY, SAMPLING, generator, uniforms
from twig.engine.inverse_cdf import invert as invert_there
from twig.engine.sampler import Request, SamplingParams, sample

JUST_BELOW_1 = 1 - 2**-53  # the largest number that `uniforms` gives

# 0.1 % quantiles of chi-square by degrees of freedom: the draws are fixed, so these are not rolled again.
CHI_SQUARE = {5: 20.52, 15: 37.70}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four 64-bit words of Philox-4x64-10 (Salmon et al., 2011), in plain integers."""
    low = 2**64 - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (right >> 64) ^ c1 ^ k0, right & low, (left >> 64) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low, (k1 + 0xBB67AE8584CAA73B) & low
    return [c0, c1, c2, c3]


def slow_uniforms(seed: int, step: int, slot: int, completion: int, length: int) -> list[float]:
    """The same numbers by the definition: block b of four is Philox of (b, completion, slot, step)."""
    words = []
    for block in range(1, length // 4 + 2):  # numpy counts on before it draws
        words += philox([block, completion, slot, step], [seed, SAMPLING])
    return [(word >> 11) * 2.0**-53 for word in words[:length]]


NAMES = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(0, 10**7), st.integers(0, 4096), st.integers(0, 1024)
)


# ---- uniform numbers by name -------------------------------------------------------------------------------


@given(NAMES, st.integers(1, 21))
@bounded
def test_uniforms_are_philox_of_their_names(names, length):
    assert uniforms(*names, length).tolist() == slow_uniforms(*names, length)


@given(NAMES, st.integers(0, 40), st.integers(0, 40))
@bounded
def test_a_longer_completion_goes_on_where_a_shorter_one_ends(names, short, more):
    assert uniforms(*names, short + more)[:short].tolist() == uniforms(*names, short).tolist()


def test_equal_names_give_equal_numbers_whatever_was_drawn_before():
    first = uniforms(3, 5, 7, 9, 50)
    np.random.seed(1)
    np.random.random(10)
    torch.manual_seed(1)
    for other in itertools.product((3, 4), (5, 6), (7, 8), (9, 10)):
        uniforms(*other, 20)
    assert uniforms(3, 5, 7, 9, 50).tolist() == first.tolist()


def test_no_number_is_drawn_for_two_names():
    """Each (seed, step, slot, completion, position) has a number of its own.

    Numbers have 53 bits: that two of these 60,000 agree by chance has a probability below 1e-6. Names that
    are permutations of one another are among them, and completions long enough to run into the next ones.
    """
    seeds, rest = (0, 1, 2, 2**32 - 1), (0, 1, 2, 3)
    rows = [uniforms(*names, 240) for names in itertools.product(seeds, rest, rest, rest)]
    numbers = np.concatenate(rows)
    assert len(numbers) == 4**4 * 240
    assert len(np.unique(numbers)) == len(numbers)


def test_the_streams_never_meet():
    """Sampling, credit, replay and the order of the data draw nothing twice, nor from each other."""
    counters = list(itertools.product(range(4), range(4), range(4)))
    streams = (SAMPLING, CREDIT, REPLAY, DATA)
    assert len(set(streams)) == 4
    numbers = [
        generator(seed, stream, *counter).random(40)
        for seed in (0, 1, 2, 3)  # also the numbers of the streams
        for stream in streams
        for counter in counters
    ]
    numbers = np.concatenate(numbers)
    assert len(numbers) == 4 * 4 * 64 * 40
    assert len(np.unique(numbers)) == len(numbers)


def test_a_generator_is_a_function_of_its_arguments():
    for counter in ((), (4,), (4, 5), (4, 5, 6)):
        first, second = generator(1, CREDIT, *counter), generator(1, CREDIT, *counter)
        first.random(3)
        assert first.random(5).tolist() == second.random(8)[3:].tolist()
    with pytest.raises(ValueError):
        generator(1, CREDIT, 4, 5, 6, 7)


# ---- uniform, independent ----------------------------------------------------------------------------------


POOLS = {  # 5,000 numbers each: along one completion, and of one position over the other names
    "positions": lambda: uniforms(0, 1, 2, 3, 5000),
    "completions": lambda: [uniforms(0, 1, 2, c, 1)[0] for c in range(5000)],
    "slots": lambda: [uniforms(0, 1, s, 3, 1)[0] for s in range(5000)],
    "steps": lambda: [uniforms(0, t, 2, 3, 6)[5] for t in range(5000)],
    "seeds": lambda: [uniforms(s, 1, 2, 3, 1)[0] for s in range(5000)],
}


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    return np.array(POOLS[request.param]())


def test_numbers_are_uniform(pool):
    """Kolmogorov's bound: sqrt(n) times the largest distance stays below 1.95 with probability 99.9 %."""
    assert pool.min() >= 0 and pool.max() < 1
    ordered, count = np.sort(pool), len(pool)
    ranks = np.arange(count + 1) / count
    distance = max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max())
    assert distance * count**0.5 < 1.95


def test_neighbours_are_independent(pool):
    """Pairs of neighbours over a 4 x 4 grid, 15 degrees of freedom; and their correlation."""
    cells = (pool * 4).astype(int)
    counts = np.bincount(cells[:-1:2] * 4 + cells[1::2], minlength=16)
    expected = len(pool) / 2 / 16
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE[15]
    assert abs(np.corrcoef(pool[:-1], pool[1:])[0, 1]) < 3.3 / len(pool) ** 0.5


# ---- from a number to a token ------------------------------------------------------------------------------


def invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The tokens, found where the tests run."""
    return invert_there(probabilities.to(numerics.place()), uniform.to(numerics.place())).cpu()


def slow_invert(probabilities: list[float], uniform: float) -> int:
    """The first token whose exact cumulative probability exceeds `uniform` of the exact sum."""
    bound = Fraction(uniform) * sum(map(Fraction, probabilities))
    total = Fraction(0)
    for token, probability in enumerate(probabilities):
        total += Fraction(probability)
        if total > bound:
            return token
    raise AssertionError("a uniform number is below 1")


# Probabilities in units of 1/1024 and numbers in units of 1/2048 have exact sums and products in float32, so
# that a number can fall on the border of two tokens, and must go to the second.
WEIGHTS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 64, 200]), min_size=1, max_size=12).filter(any)
ROWS = st.lists(st.tuples(WEIGHTS, st.integers(0, 2047)), min_size=1, max_size=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(rows=ROWS)
@bounded
def test_invert_equals_a_loop_over_the_vocabulary(dtype, rows):
    width = max(len(weights) for weights, _ in rows)
    table = np.array([weights + [0] * (width - len(weights)) for weights, _ in rows]) / 1024
    numbers = np.array([number for _, number in rows]) / 2048
    tokens = invert(torch.tensor(table, dtype=dtype), torch.tensor(numbers, dtype=dtype)).tolist()
    assert tokens == [slow_invert(row, u) for row, u in zip(table.tolist(), numbers.tolist(), strict=True)]
    assert all(table[row, token] > 0 for row, token in enumerate(tokens))


def test_borders_worked_out_by_hand():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for uniform, token in (
        (0.0, 1),
        (0.25 - 2**-54, 1),
        (0.25, 3),
        (0.75 - 2**-53, 3),
        (0.75, 4),
        (JUST_BELOW_1, 4),
    ):
        assert invert(probabilities, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 1e-300, 1e-45, 2.0**-53, 0.5, 1 - 2.0**-24, JUST_BELOW_1])
def test_no_number_falls_off_either_end(dtype, uniform):
    """Rows with zeros at both ends, also those that sum to a little less or more than 1.

    NOTE: in float32 the largest number is rounded to 1, which must still give a token of the row.
    """
    rows = [
        [0.0, 0.3, 0.0, 0.7, 0.0],
        [0.0, 1.0, 0.0, 0.0, 0.0],
        [0.0, 0.2, 0.3, 0.499, 0.0],
        [0.0, 0.1, 0.2, 0.7001, 0.0],
        [0.0, 1e-30, 1.0, 1e-30, 0.0],
        [0.1] * 5,
        [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0],
    ]
    table = torch.tensor(rows, dtype=dtype)
    tokens = invert(table, torch.full((len(rows),), uniform, dtype=dtype))
    assert (table[torch.arange(len(rows)), tokens] > 0).all()
    low = [1, 1, 1, 1, 1, 0, 0]
    high = [3, 1, 3, 3, 2, 4, 2]  # 1e-30 at the end of a row of 1 is lost in the sum
    if uniform == 0:
        assert tokens.tolist() == low
    if uniform == JUST_BELOW_1:
        assert tokens.tolist() == high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "peaked", "mostly suppressed"])
def test_a_large_vocabulary(dtype, kind):
    """151,936 tokens (Qwen2): each token drawn has a probability, and is the loop's but for rounding."""
    size, rows = 151_936, 40
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, size, generator=draw, dtype=dtype) * {"flat": 0.1}.get(kind, 8.0)
    logits[:, -3000:] = float("-inf")  # a padded vocabulary
    if kind == "mostly suppressed":
        logits[torch.rand(rows, size, generator=draw) < 0.99] = float("-inf")
    probabilities = logits.softmax(-1)
    uniform = torch.linspace(0, 1, rows, dtype=dtype)
    uniform[-1] = torch.tensor(JUST_BELOW_1, dtype=dtype)
    tokens = invert(probabilities, uniform)
    assert ((tokens >= 0) & (tokens < size - 3000)).all()
    assert (probabilities[torch.arange(rows), tokens] > 0).all()
    exact = probabilities.double().numpy()
    ends = exact.cumsum(1) / exact.sum(1, keepdims=True)
    chosen, error = tokens.numpy(), 1e-4 if dtype == torch.float32 else 1e-10
    at = np.arange(rows)
    below = np.where(chosen > 0, ends[at, chosen - 1], 0.0)
    assert (below <= uniform.numpy() + error).all() and (uniform.numpy() < ends[at, chosen] + error).all()


def test_a_row_does_not_depend_on_its_neighbours():
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(9, 500, generator=draw).softmax(-1)
    uniform = torch.rand(9, generator=draw)
    whole = invert(table, uniform).tolist()
    assert len(set(whole)) > 5
    assert [invert(table[i : i + 1], uniform[i : i + 1]).item() for i in range(9)] == whole


# ---- frequencies -------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    assert (counts[probabilities == 0] == 0).all(), "a token without probability was drawn"
    expected = probabilities[probabilities > 0] * counts.sum()
    assert expected.min() > 5, "each cell needs some draws"
    return float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())


def test_frequencies_match_the_probabilities():
    """Over the completions of many slots, at all positions: 6 tokens with a probability, 5 degrees."""
    probabilities = np.array([0.4, 0.0, 0.3, 0.15, 0.1, 0.045, 0.005, 0.0])
    noise = np.stack([uniforms(11, 1, slot, c, 50) for slot in range(40) for c in range(16)])
    table = torch.from_numpy(probabilities).expand(noise.size, -1)
    tokens = invert(table, torch.from_numpy(noise.ravel())).numpy()
    assert chi_square(np.bincount(tokens, minlength=8), probabilities) < CHI_SQUARE[5]


def test_tokens_that_follow_each_other_are_independent():
    """Pairs (position t, t + 1) and pairs (completion c, c + 1): 16 cells, 15 degrees."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    noise = np.stack([uniforms(5, 2, 0, c, 200) for c in range(60)])
    table = probabilities.expand(noise.size, -1)
    tokens = invert(table, torch.from_numpy(noise.ravel())).numpy().reshape(noise.shape)
    expected = np.outer(probabilities, probabilities).ravel()
    for first, second in ((tokens[:, ::2], tokens[:, 1::2]), (tokens[::2], tokens[1::2])):
        counts = np.bincount((first * 4 + second).ravel(), minlength=16)
        assert chi_square(counts, expected) < CHI_SQUARE[15]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_first_tokens_of_a_model_match_its_probabilities(temperature):
    """3,000 completions of one token; a suppressed token never comes, and temperature counts."""
    policy = tiny.build_policy(temperature=temperature, suppress_tokens=[4, 7])
    request = Request(np.array([3, 9, 12, 5]), 3000, 1, 0)
    params = SamplingParams([1], lambda rows: [""] * len(rows), seed=2, wave_size=1000)
    drawn = sample(policy, [request], params)
    tokens = np.array([completion.ids[0] for completion in drawn.completions[0]])
    counts = np.bincount(tokens, minlength=tiny.VOCAB)
    with torch.no_grad():
        ids = torch.from_numpy(request.prompt_ids)[None].to(policy.device)
        logits = policy.model(input_ids=ids).logits[0, -1].cpu()
    logits = logits / temperature
    logits[[4, 7]] = float("-inf")
    probabilities = logits.softmax(-1).numpy()
    expected = probabilities * 3000
    order = np.argsort(expected)
    rarest = order[: 1 + np.searchsorted(expected[order].cumsum(), 8)]
    rare = (probabilities > 0) & ((expected < 8) | np.isin(np.arange(tiny.VOCAB), rarest))  # one cell
    cells = np.append(probabilities[~rare], probabilities[rare].sum())
    degrees = int((cells > 0).sum()) - 1
    # Wilson and Hilferty's approximation of the 0.1 % quantile, whose normal quantile is 3.09
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees > 5
    assert chi_square(np.append(counts[~rare], counts[rare].sum()), cells) < bound
