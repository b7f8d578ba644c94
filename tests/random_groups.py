"""Random groups for property tests: short completions over few tokens, so that they share prefixes often."""

from hypothesis import settings
from hypothesis import strategies as st

# The same examples on every machine: a property that fails once fails always. How many: see conftest.py.
bounded = settings(deadline=None, derandomize=True)

rewards = st.sampled_from([0.0, 1.0, 0.1, 1 / 3, -0.5]) | st.floats(-2, 2).map(lambda r: round(r, 6))


@st.composite
def groups(draw, max_size=6, longest=6, reward=rewards):
    """(completions, rewards): lists of token ids, some of them empty, duplicates, or prefixes of others."""
    token = st.integers(0, 2)
    completions = draw(st.lists(st.lists(token, max_size=longest), min_size=1, max_size=max_size))
    for _ in range(draw(st.integers(0, 3))):
        source = draw(st.sampled_from(completions))
        completions.append(source[: draw(st.integers(0, len(source)))])
    completions = draw(st.permutations(completions))
    size = len(completions)
    return completions, draw(st.lists(reward, min_size=size, max_size=size))
