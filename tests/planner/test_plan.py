"""The plan of memory: rows worked out by hand, sums, budgets, what is chosen and what is advised."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from twig.cli.app import main
from twig.cli.plan import assumed_prompt, longest_prompt_at_hand
from twig.common.errors import UserError
from twig.config.load import Settings, load, recipe_names, recipe_text
from twig.config.sizes import DEFAULT_SIZES, SIZE_KEYS, Sizes, open_sizes, with_sizes
from twig.core.algorithms.base import Credit
from twig.core.credit import Scored
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine import lm_head, sampler, wave_cache
from twig.engine.pack import build_packs
from twig.planner import layer_costs
from twig.planner.choose import choose_sizes
from twig.planner.layer_costs import Wave, filled_slots, pack_tables, waves_of
from twig.planner.ledger import Ledger
from twig.planner.model_shape import Shape, Unplannable
from twig.planner.phases import CUDA_GRAPH, LIBRARIES, OUTSIDE, Footprint
from twig.planner.plan import _wave_sizes, plan, workload_of
from twig.runtime.memory_use import CUDA_CONTEXT

MIB, GIB = 2**20, 2**30
MINIMAL = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
SMALL = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_QWEN2 = {"model_type": "qwen2", "torch_dtype": "bfloat16", "tie_word_embeddings": True, "vocab_size": 151936}
# The public shapes of the recipes' models: hidden width, MLP width, layers, heads, key-value heads.
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
MODELS = {
    "Qwen/Qwen2-1.5B": _QWEN2 | dict(zip(_WIDTHS, (1536, 8960, 28, 12, 2), strict=True)),
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2 | dict(zip(_WIDTHS, (896, 4864, 24, 14, 2), strict=True)),
    "Qwen/Qwen3-1.7B": _QWEN2
    | dict(zip(_WIDTHS, (2048, 6144, 28, 16, 8), strict=True))
    | {"model_type": "qwen3", "head_dim": 128},
    "meta-llama/Llama-3.2-1B-Instruct": _QWEN2
    | dict(zip(_WIDTHS, (2048, 8192, 16, 32, 8), strict=True))
    | {"model_type": "llama", "vocab_size": 128256, "head_dim": 64},
    # as far as their published configs are known here
    "Qwen/Qwen3.5-0.8B": _QWEN2
    | dict(zip(_WIDTHS, (1024, 3584, 24, 8, 2), strict=True))
    | {"model_type": "qwen3_5_text", "vocab_size": 248320, "head_dim": 256, "full_attention_interval": 4}
    | {"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    "LiquidAI/LFM2-350M": _QWEN2
    | dict(zip(_WIDTHS, (1024, 6656, 16, 16, 8), strict=True))
    | {"model_type": "lfm2", "vocab_size": 65536, "conv_L_cache": 3, "block_auto_adjust_ff_dim": True}
    | {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "smollm2-words": _QWEN2  # the shape of SmolLM2 135M, of which the folder is made
    | dict(zip(_WIDTHS, (576, 1536, 30, 9, 3), strict=True))
    | {"model_type": "llama", "vocab_size": 49152, "head_dim": 64},
}
BILLION = MODELS["Qwen/Qwen2-1.5B"]
GPUS = (2, 4, 6, 8, 12, 16, 24)


def settings_of(*overrides):
    return Settings.from_dict(MINIMAL, overrides)


def items(planned, phase):
    (one,) = [p for p in planned.phases if p.name == phase]
    return {item.name: item.size for item in one.items}


# Rows by hand


def test_what_a_run_holds_all_along_is_counted_by_hand():
    """A layer has 8*8 + 2*8*4 + 8*8 + 3*8*16 = 576 weights and two norms of 8; embedding and head 10*8 each,
    and a last norm. The adapter of rank 2 on q and v of one layer: 2*(8+8) + 2*(8+4) = 56 numbers."""
    planned = plan(SMALL, settings_of("lora.r=2", *HAND), GIB, "cpu", prompt_tokens=3)
    held = items(planned, "sampling")
    assert held["base weights"] == 4 * (3 * (576 + 16) + 2 * 80 + 8)
    assert (held["adapter"], held["gradients"], held["optimizer"]) == (4 * 56, 4 * 56, 2 * 4 * 56)
    # 2 prompts of 3 tokens, 4 completions of 5 tokens each; a row is 8 numbers wide
    assert held["trunk's output, recorded"] == 2 * (3 + 4 * 5) * 8 * 4
    # 8 completions of 5 slots behind 2 prompts of 3; 3 layers of a key and a value of 4 numbers
    assert held["key-value cache"] == (8 * (5 + 3) + 2 * 3) * 3 * 2 * 4 * 4
    assert held["libraries"] == LIBRARIES["cpu"] + 15 * MIB


HAND = ("rollout.num_generations=4", "rollout.prompts_per_step=2", "rollout.max_completion_length=5")


def test_a_head_chunk_is_counted_by_hand():
    """GRPO on 2 x 4 completions of 5 tokens in one pack: the root and 4 tokens of each predict one."""
    overrides = ("algorithm.name=grpo", "train.pack_size=1000", "train.head_chunk=170", *HAND)
    planned = plan(SMALL, settings_of(*overrides), GIB, "cpu", prompt_tokens=3)
    rows = 2 * (1 + 4 * 4)
    # 170 // 34 = 5 of the vocabulary of 10 at a time; the chunk before is still alive when one is computed
    assert items(planned, "update").get("head chunk", 0) in (0, 5 * rows * (4 + 4))
    work = workload_of(Shape.from_config(SMALL), settings_of(*overrides), "cpu", 3)
    ledger = Ledger()
    Footprint(work, Sizes(8, 1000, 170, False, 8))._head(ledger, rows, rows)
    assert ledger.highest["head chunk"] in (0, 5 * rows * 8)
    assert ledger.peak >= 5 * rows * 8


def test_weights_at_forks_only_take_smaller_packs_on_a_cpu():
    def pack(algorithm, kind, *overrides):
        return plan(SMALL, settings_of(f"algorithm.name={algorithm}", *overrides), GIB, kind).sizes.pack_size

    assert pack("t-spmo", "cpu") == pack("grpo", "cpu") // 2
    assert pack("t-spmo", "cuda") == pack("grpo", "cuda")
    # never smaller than a path
    assert pack("t-spmo", "cpu", "rollout.max_completion_length=900") == 900


def test_a_ledger_remembers_its_highest_moment():
    ledger = Ledger({"a": 1})
    ledger.take("b", 5)
    ledger.moment("c", 4)
    ledger.drop("b")
    ledger.take("d", 8)
    planned = ledger.phase("x")
    assert planned.peak == 10
    assert [(item.name, item.size) for item in planned.items] == [("b", 5), ("c", 4), ("a", 1)]


# Sums, budgets, order

_ASKED = st.fixed_dictionaries(
    {
        "algorithm.name": st.sampled_from(["grpo", "s-grpo", "t-spmo"]),
        "rollout.num_generations": st.integers(2, 40),
        "rollout.prompts_per_step": st.integers(1, 9),
        "rollout.max_completion_length": st.integers(1, 700),
        "lora.layers": st.sampled_from(["last_third", "all", "[5]"]),
        "model.attn_implementation": st.sampled_from(["sdpa", "eager"]),
    }
)


@examples(max_examples=10, deadline=None)
@given(_ASKED, st.integers(1, 600), st.integers(1, 30), st.integers(0, 30), st.sampled_from(["cpu", "cuda"]))
def test_phases_add_up_and_a_larger_budget_never_chooses_less(asked, prompt, first, more, kind):
    settings = settings_of(*(f"{key}={value}" for key, value in asked.items()))
    small, large = (
        plan(BILLION, settings, n * GIB, kind, prompt_tokens=prompt) for n in (first, first + more)
    )
    for planned in (small, large):
        assert all(phase.peak == sum(item.size for item in phase.items) for phase in planned.phases)
        assert all(item.size > 0 for phase in planned.phases for item in phase.items)
        assert planned.fits == all(phase.peak <= 0.95 * planned.budget for phase in planned.phases)
        assert planned.fits or planned.advice or planned.sizes.wave_size == 1
    assert large.fits or not small.fits
    less, more = small.sizes, large.sizes
    if small.decode == "plain" != large.decode:
        assert 4 * more.wave_size >= less.wave_size
        return
    assert more.wave_size >= less.wave_size and more.eval_batch_size >= less.eval_batch_size
    if kind == "cuda" and more.wave_size > less.wave_size:
        return  # what a larger wave keeps is not there for the update
    if not less.checkpoint_layers:
        assert more.pack_size >= less.pack_size and more.head_chunk >= less.head_chunk
    assert less.checkpoint_layers or not more.checkpoint_layers


@pytest.mark.slow
@examples(max_examples=10, deadline=None)
@given(_ASKED, st.integers(1, 600), st.data())
def test_more_of_anything_never_takes_less(asked, prompt, data):
    fixed = ("rollout.wave_size=16", "train.pack_size=512", "train.head_chunk=65536")
    fixed += ("train.checkpoint_layers=false", "eval.batch_size=16")

    def peak(values, prompt):
        settings = settings_of(*fixed, *(f"{key}={value}" for key, value in values.items()))
        return plan(BILLION, settings, GIB, "cpu", prompt_tokens=prompt).peak

    key = data.draw(st.sampled_from(["rollout.prompts_per_step", "rollout.max_completion_length", "prompt"]))
    if key == "prompt":
        assert peak(asked, prompt + 16) >= peak(asked, prompt)
    else:
        assert peak(asked | {key: asked[key] + 16}, prompt) >= peak(asked, prompt)


def apart(number, ids, lengths):
    """A prompt with completions of these lengths that share nothing, every token weighted."""
    completions = [Completion(np.full(n, own), *np.zeros((2, n)), True, "") for own, n in enumerate(lengths)]
    rewards = np.zeros(len(completions))
    trie = PrefixTrie.build([c.ids for c in completions], rewards)
    credit = Credit(np.ones(len(trie)) * (np.arange(len(trie)) > 0), *np.zeros((2, len(trie))))
    return Scored(Group(Example(""), number, ids, completions, rewards), trie, credit, number)


def tables_of(prompts, paths, length, longest, size):
    """The largest packs of `size` cells, as planned."""
    settings = settings_of(
        "algorithm.name=grpo",
        f"rollout.num_generations={paths}",
        f"rollout.prompts_per_step={prompts}",
        f"rollout.max_completion_length={length}",
    )
    return pack_tables(workload_of(Shape.from_config(SMALL), settings, "cpu", longest), size)


@examples(max_examples=25, deadline=None)
@example(9, 200, 5, 2, 5, 1024)  # packs with and without a stem fit
@example(9, 100, 30, 2, 5, 64)  # behind a stem only
@example(9, 100, 30, 4, 20, 64)  # tries are cut
@given(
    *(st.integers(2, 9), st.integers(1, 200), st.integers(0, 30), st.integers(2, 4), st.integers(1, 20)),
    st.sampled_from([0, 64, 200, 500, 1024]),
)
def test_packs_of_prompts_that_begin_alike_are_as_large_as_planned_at_most(
    prompts, alike, rest, paths, length, size
):
    """Completions of full length share nothing; prompts begin with the same `alike` tokens."""
    size = max(size, length)
    scored = []
    for number in range(prompts):
        ids = np.array([*range(alike), *[1000 + number] * (rest + 1)])
        scored.append(apart(number, ids, [length] * paths))
    tables = tables_of(prompts, paths, length, alike + rest + 1, size)
    for pack in build_packs(scored, size):
        (rows, columns), stem = pack.ids.shape, len(pack.stem or ())
        assert stem <= max(table.stem for table in tables)
        assert any(
            table.rows >= rows
            and table.columns >= columns
            and table.keys >= stem + columns
            and table.head >= len(pack.rows)
            for table in tables
        ), (pack.ids.shape, stem, tables)


@examples(max_examples=25, deadline=None)
@example(0, 9, 60, 80, 2, 24, 200)  # two and a half of the shorter ones fit where one of the longest does
@given(
    *(st.integers(0, 99), st.integers(2, 9), st.integers(1, 90), st.integers(1, 90), st.integers(2, 4)),
    *(st.integers(1, 24), st.sampled_from([64, 200, 500, 1024])),
)
def test_packs_of_shorter_prompts_and_answers_have_no_more_cells_than_planned(
    seed, prompts, shortest, longest, paths, length, size
):
    """Tries of all sizes fill a pack; the plan counts one that is full."""
    draw, scored = np.random.default_rng(seed), []
    for number in range(prompts):
        ids = np.full(draw.integers(min(shortest, longest), longest, endpoint=True), 1000 + number)
        scored.append(apart(number, ids, draw.integers(1, length, paths, endpoint=True)))
    size = max(size, length)
    tables = tables_of(prompts, paths, length, longest, size)
    for pack in build_packs(scored, size):
        assert any(t.tokens >= pack.ids.size and t.head >= len(pack.rows) for t in tables), (
            pack.ids.shape,
            tables,
        )


def test_what_the_settings_say_is_not_chosen():
    overrides = ["rollout.wave_size=3", "train.pack_size=77", "train.head_chunk=99", "eval.batch_size=5"]
    planned = plan(BILLION, settings_of(*overrides, "train.checkpoint_layers=true"), 24 * GIB, "cuda")
    assert planned.sizes == Sizes(3, 77, 99, True, 5)


def test_weights_are_packed_only_if_there_is_room():
    fast = settings_of(*HAND, "model.kernels=onednn", "eval.batch_size=8")
    # three layers of 8 x (8 + 4 + 4 + 8) and 3 x 8 x 16 numbers, and a head of 10 x 8, in float32
    packed = 4 * (3 * (8 * 24 + 3 * 8 * 16) + 10 * 8)
    roomy = plan(SMALL, fast, GIB, "cpu", prompt_tokens=3)
    assert roomy.sizes.packed_weights
    assert (
        items(roomy, "sampling")["packed weights"] == items(roomy, "evaluation")["packed weights"] == packed
    )
    assert "packed weights" not in items(roomy, "update")
    # A budget that is just enough without copies
    larger = SMALL | {"hidden_size": 2048, "intermediate_size": 8192}
    bare = plan(larger, settings_of(*HAND, "model.kernels=torch"), GIB, "cpu", prompt_tokens=3)
    tight = plan(larger, fast, int(bare.peak / 0.95) + 1, "cpu", prompt_tokens=3)
    assert tight.fits and not tight.sizes.packed_weights


def test_packed_weights_are_as_set_and_only_where_onednn_multiplies():
    for value in (True, False):
        fast = settings_of(*HAND, "model.kernels=onednn", f"rollout.packed_weights={value}".lower())
        assert plan(SMALL, fast, GIB, "cpu").sizes.packed_weights is value
    for overrides in (["model.kernels=torch"], ["model.kernels=onednn", "model.dtype=bfloat16"]):
        asked = settings_of(*HAND, *overrides, "rollout.packed_weights=true")
        assert not plan(SMALL, asked, GIB, "cpu").sizes.packed_weights


def test_packed_weights_are_there_beside_a_whole_wave():
    """The few branches that a wave begins with may use them before they become many."""
    fast = ("rollout.num_generations=100", "rollout.prompts_per_step=2", "rollout.max_completion_length=5")
    fast += ("model.kernels=onednn", "rollout.packed_weights=true")
    packed = 4 * (3 * (8 * 24 + 3 * 8 * 16) + 10 * 8)
    crowded = items(plan(SMALL, settings_of(*fast), GIB, "cpu", prompt_tokens=3), "sampling")
    assert crowded["packed weights"] == packed
    # 200 rows of 5 slots behind 2 prompts of 3; 3 layers of a key and a value of 4 numbers
    assert crowded["key-value cache"] == (200 * (5 + 3) + 2 * 3) * 3 * 2 * 4 * 4


def test_completions_that_end_early_fill_fewer_slots():
    """Pages count once they are written to: 14 of 4 x 8 slots."""
    overrides = ("rollout.num_generations=4", "rollout.prompts_per_step=1", "rollout.max_completion_length=8")
    work = workload_of(Shape.from_config(SMALL), settings_of(*overrides), "cpu", 3)
    whole, early = (
        Footprint(replace(work, filled=filled), Sizes(4, 64, 170, False)).sampling() for filled in (None, 14)
    )
    slot = 3 * 2 * 4 * 4  # 3 layers of a key and a value of 4 numbers
    assert whole.peak - early.peak == (4 * 8 - 14) * slot
    # A page of 8 slots: half of one more in each row; but there is no room for more than `longest`.
    assert filled_slots([1, 1, 4, 4], 8, page=8) == 2 * (3 + 4)
    assert filled_slots([8] * 4, 8, page=8) == 4 * 8


def test_an_evaluation_asks_short_prompts_first():
    """Nine prompts of 3 tokens and one of 20, up to 9 at once: the last batch is the longest one alone."""
    settings = settings_of("rollout.max_completion_length=50", "eval.batch_size=9")

    def evaluation(questions):
        return plan(SMALL, settings, GIB, "cpu", prompt_tokens=3, questions=questions).phases[3]

    slot = 3 * 2 * 4 * 4  # 3 layers of a key and a value of 4 numbers
    for questions, width in (([3] * 9 + [20], 3), ([20, 4, *[3] * 8], 4), ([5] * 10, 5), (10, 3)):
        kept = {item.name: item.size for item in evaluation(questions).items}
        # short prompts are copied to their completions
        assert kept["key-value cache"] == 9 * (width + width + 50) * slot
    # A single prompt that is long enough takes more than nine short ones.
    assert evaluation([3] * 9 + [600]) == evaluation([600])


def test_the_planner_knows_the_engines_constants():
    """It does not import torch, so it has them a second time."""
    assert layer_costs.HELD_FROM == 16  # wave_cache.HELD_FROM, which the engine's tests change
    assert layer_costs.READ_AT_ONCE == wave_cache.READ_AT_ONCE
    assert layer_costs.HELD_FROM == wave_cache.HELD_FROM and layer_costs.HEAD_PART == lm_head._PART
    assert layer_costs.LOGITS_AT_ONCE == sampler._LOGITS_AT_ONCE


def test_from_16_tokens_on_prompts_are_held_once():
    def cache(tokens):
        settings = settings_of("rollout.max_completion_length=50", "eval.batch_size=9")
        planned = plan(SMALL, settings, GIB, "cpu", prompt_tokens=tokens, questions=[tokens] * 9)
        return {item.name: item.size for item in planned.phases[3].items}["key-value cache"]

    slot = 3 * 2 * 4 * 4
    assert cache(16) == 9 * (16 + 50) * slot
    assert cache(15) == 9 * (15 + 15 + 50) * slot


def test_the_longest_restart_is_the_median_of_a_run():
    """Half of the prompts of 3 and 7 tokens get 1 to 4 of a completion of 5: 4 to 7 and 8 to 11 tokens."""
    asked = ("algorithm.replay.probability=0.5", "rollout.prompts_per_step=2", *HAND[::2])

    def longest(steps, prompts):
        settings = settings_of(*asked, f"train.max_steps={steps}")
        return workload_of(Shape.from_config(SMALL), settings, "cpu", prompts).sampled_prompt

    # One restart, in the second step: one in two has at most 7 tokens, which is no more than a fresh prompt.
    assert longest(2, [3, 7]) == 7
    # Two: both have at most 9 tokens in 6/8 * 6/8 of the runs, at most 8 in 5/8 * 5/8.
    assert longest(3, [3, 7]) == 9
    assert longest(1000, [3, 7]) == 7 + 4 and longest(1, [3, 7]) == 7
    assert longest(2, 7) == 7 + 4, "what else there is is not known"


def test_restarts_are_planned_for():
    """One whose prompt has nearly a whole completion may lie beside one that has none."""
    plain, replayed = (
        plan(SMALL, settings_of(*HAND, f"algorithm.replay.probability={p}"), GIB, "cpu", prompt_tokens=3)
        for p in (0, 0.5)
    )
    before, after = (items(each, "sampling")["key-value cache"] for each in (plain, replayed))
    # 4 slots more for each of 2 prompts and, as these are short, of 8 completions
    assert after - before == (2 + 8) * 4 * 3 * 2 * 4 * 4


# A CUDA device


def names(planned, phase):
    return set(items(planned, phase))


def test_on_cuda_a_step_that_is_kept_is_there_in_the_update_too():
    overrides = ("algorithm.name=grpo", "rollout.num_generations=8", "rollout.prompts_per_step=4")
    planned = plan(BILLION, settings_of(*overrides), 24 * GIB, "cuda", prompt_tokens=100)
    assert planned.sizes.wave_size == 32
    # 32 completions of 256 slots behind the 128 of their prompts, of which there are so few that each row has
    # them; 28 layers with 2 x 2 heads of 128. Then per token the id, and log-prob, entropy and noise in
    # float32, and the trunk's output; per row the next logits
    cache = 32 * (128 + 256) * 28 * 2 * 256 * 2
    row = 256 * (8 + 3 * 4 + 1536 * 2) + 151936 * 4
    rotary = 2 * (128 + 256) * 128 * 2
    for phase in ("sampling", "update"):
        assert items(planned, phase)["decode buffers"] == cache + 32 * row + rotary
        assert items(planned, phase)["captured graph"] == CUDA_GRAPH + 3 * 32 * 151936 * 4
    assert {"context", "workspaces", "allocator's reserve"} <= names(planned, "loading")
    assert "decode buffers" not in names(planned, "loading")


@pytest.mark.parametrize("word", ["rollout.decode=plain", "model.engine=plain", "rollout.stop=[x]"])
def test_sampling_without_captured_steps_keeps_none(word):
    planned = plan(BILLION, settings_of(word), 24 * GIB, "cuda", prompt_tokens=100)
    assert not any("decode buffers" in names(planned, phase.name) for phase in planned.phases)
    assert workload_of(Shape.from_config(BILLION), settings_of(), "cpu", 100).static_decode is False


def test_the_peak_that_torch_counts_is_that_of_the_tensors_alone():
    """While a step is captured it is at work in torch's memory; later what it needs is the graph's own."""
    planned = plan(BILLION, settings_of(), 24 * GIB, "cuda", prompt_tokens=100)
    outside = {p.name: sum(i.size for i in p.items if i.name in OUTSIDE) for p in planned.phases}
    tensors = [phase.peak - outside[phase.name] for phase in planned.phases]
    assert CUDA_CONTEXT < min(outside.values())
    assert max(tensors) <= planned.tensors_peak < planned.peak - CUDA_CONTEXT
    plain = plan(BILLION, settings_of("rollout.decode=plain"), 24 * GIB, "cuda", prompt_tokens=100)
    tensors = [sum(i.size for i in p.items if i.name not in OUTSIDE) for p in plain.phases]
    assert plain.tensors_peak == max(tensors)


@pytest.mark.parametrize(
    ("generations", "prompts", "sizes"),
    [
        (8, 8, {64, 32, 24, 16, 8, 4, 2, 1}),
        (50, 8, {200, 150, 100, 50, 25, 10, 5, 2, 1}),
        (300, 2, {150, 100, 75, 60, 50, 30, 25, 20, 15, 12, 10, 6, 5, 4, 3, 2, 1}),
    ],
)
def test_waves_of_captured_steps_are_whole_groups_or_equal_parts_of_one(generations, prompts, sizes):
    overrides = (f"rollout.num_generations={generations}", f"rollout.prompts_per_step={prompts}")
    work = workload_of(Shape.from_config(BILLION), settings_of(*overrides), "cuda", 100)
    assert set(_wave_sizes(work, None)) == sizes
    assert _wave_sizes(work, 7) == [7]


@examples(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 60))
def test_waves_are_those_that_sampling_makes(prompts, generations, size):
    rows = [prompt for prompt in range(prompts) for _ in range(generations)]
    waves = [rows[i : i + size] for i in range(0, len(rows), size)]
    assert set(waves_of(prompts, generations, size)) == {
        Wave(len(set(wave)), max(map(wave.count, wave))) for wave in waves
    }


def test_where_captured_steps_do_not_fit_the_plain_loop_is_chosen_and_said():
    overrides = ("rollout.num_generations=16", "rollout.prompts_per_step=8", "model.dtype=bfloat16")
    config = MODELS["Qwen/Qwen2.5-0.5B-Instruct"]
    small, large = (plan(config, settings_of(*overrides), int(n * GIB), "cuda") for n in (2.1, 12))
    assert small.fits and (small.decode, large.decode) == ("plain", None)
    assert any("rollout.decode=plain" in note for note in small.notes)
    assert not any("rollout.decode" in note for note in large.notes)
    fixed = plan(config, settings_of(*overrides, "rollout.decode=graph"), int(1.95 * GIB), "cuda")
    assert fixed.decode is None and "rollout.decode=plain" in {each.changes for each in fixed.advice}
    planned = choose_sizes(settings_of(*overrides), config, "cuda", int(2.1 * GIB), prompt_tokens=256)
    assert planned.settings.rollout.decode == "plain"


def test_a_wave_leaves_room_for_the_update():
    overrides = (
        "rollout.num_generations=32",
        "rollout.prompts_per_step=8",
        "rollout.max_completion_length=1024",
    )
    settings = settings_of(*overrides, "algorithm.name=grpo")
    planned = plan(BILLION, settings, 7 * GIB, "cuda", prompt_tokens=100)
    assert planned.fits
    kept = [
        item.size for phase in planned.phases[1:3] for item in phase.items if item.name == "decode buffers"
    ]
    assert kept[0] == kept[1]


# What to change


def test_advice_is_in_order_of_cost_and_works():
    """Sizes that somebody wrote come first: only speed depends on them."""
    overrides = ["rollout.wave_size=128", "train.pack_size=4096", "train.checkpoint_layers=false"]
    overrides += ["algorithm.name=grpo", "rollout.max_completion_length=8000", "model.dtype=float32"]
    settings, budget = (
        settings_of(*overrides, "lora.layers=all", "rollout.prompts_per_step=64"),
        int(4.3 * GIB),
    )
    planned = plan(BILLION, settings, budget, "cuda", prompt_tokens=200)
    assert not planned.fits
    keys = [re.sub("=[^ ]*", "", each.changes) for each in planned.advice]
    assert keys == [
        "rollout.wave_size train.pack_size train.checkpoint_layers",
        "model.dtype",
        "rollout.max_completion_length",
    ]
    assert planned.advice[0].changes.endswith("train.checkpoint_layers=null")
    peaks = [planned.peak, *(each.peak for each in planned.advice)]
    assert peaks == sorted(peaks, reverse=True)
    assert [each.fits for each in planned.advice] == [False] * (len(keys) - 1) + [True]
    changed = settings.with_overrides([word for each in planned.advice for word in each.changes.split()])
    assert plan(BILLION, changed, budget, "cuda", prompt_tokens=200).peak == peaks[-1]


@pytest.mark.parametrize("stored", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_a_base_that_fits_only_in_4_bits_is_told_to_be_quantised(stored):
    """A 7B: 28 layers of 3584 and two matrices of 152,064 rows are 14 GiB in bfloat16 and under 7 in nf4."""
    config = BILLION | dict(zip(_WIDTHS, (3584, 18944, 28, 28, 4), strict=True))
    config |= {"tie_word_embeddings": False, "vocab_size": 152064, "quantization_config": stored}
    settings = settings_of("model.dtype=bfloat16", "rollout.max_completion_length=128")
    planned = plan(config, settings, 8 * GIB, "cuda", prompt_tokens=100)
    assert not planned.fits
    assert any(each.changes == "model.quantization=nf4" for each in planned.advice) == (stored is None)
    if stored is None:
        assert planned.advice[-1].fits and planned.advice[-1].changes == "model.quantization=nf4"
        changed = settings.with_overrides([each.changes for each in planned.advice])
        assert plan(config, changed, 8 * GIB, "cuda", prompt_tokens=100).fits
    gguf = settings.with_overrides(["model.name=x.gguf"])
    advice = plan(config, gguf, 8 * GIB, "cuda", prompt_tokens=100).advice
    assert not any("quantization" in each.changes for each in advice)


# What a run makes of it


def sized(*overrides, config=SMALL, free=GIB, **options):
    options = {"prompt_tokens": 3} | options
    return choose_sizes(settings_of(*overrides), config, "cpu", free, **options)


def test_open_sizes_are_chosen_and_others_kept():
    chosen = sized("rollout.wave_size=7")
    assert chosen.settings.rollout.wave_size == 7 and open_sizes(chosen.settings) == []
    assert chosen.settings.flat()["train.pack_size"] == chosen.plan.sizes.pack_size
    assert chosen.warning is None
    assert open_sizes(settings_of()) == list(SIZE_KEYS)
    assert with_sizes(settings_of(), DEFAULT_SIZES.by_key()).flat().items() >= DEFAULT_SIZES.by_key().items()


def test_a_budget_that_somebody_wrote_is_kept():
    with pytest.raises(UserError, match=r"^memory\.budget: 1GiB .*model\.dtype=bfloat16 \(") as caught:
        sized("memory.budget=1GiB", "model.dtype=float32", config=BILLION)
    assert caught.value.key == "memory.budget"
    with pytest.raises(UserError, match=r"^memory\.budget: 0\.5 .*model\.dtype=bfloat16 \("):
        sized("memory.budget=0.5", "model.dtype=float32", config=BILLION, free=8 * GIB)
    assert sized("memory.budget=200MiB", free=1).warning is None, "a size does not ask what is free"


@pytest.mark.parametrize("overrides, options", [((), {}), (("memory.budget=1GiB",), {"strict": False})])
def test_what_does_not_fit_is_a_warning_without_an_explicit_budget_or_for_a_resumed_run(overrides, options):
    chosen = sized(*overrides, config=BILLION, **options)
    assert "GiB" in chosen.warning and "model.dtype=bfloat16" in chosen.warning
    assert chosen.settings.rollout.wave_size == 1


def test_a_model_that_cannot_be_planned_gets_the_defaults_and_says_so():
    chosen = sized("rollout.wave_size=7", config={"model_type": "gpt2"})
    assert (chosen.plan, chosen.settings.rollout.wave_size) == (None, 7)
    assert chosen.settings.train.pack_size == DEFAULT_SIZES.by_key()["train.pack_size"]
    assert "'gpt2'" in chosen.warning and "train.checkpoint_layers=false" in chosen.warning
    all_set = [f"{key}={value}".lower() for key, value in DEFAULT_SIZES.by_key().items()]
    assert sized(*all_set, config={"model_type": "gpt2"}).warning is None
    with pytest.raises(UserError, match=r"^memory\.budget: 6GiB .*'gpt2'"):
        sized("memory.budget=6GiB", config={"model_type": "gpt2"})
    with pytest.raises(Unplannable, match="c_attn"):
        plan(SMALL, settings_of("lora.target_modules=[c_attn]"), GIB, "cpu")


# The recipes


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_what_memory_it_takes(name):
    settings = load(name)
    assert open_sizes(settings) == list(SIZE_KEYS), "a recipe leaves them to the device"
    said = re.search(r"^# Memory, predicted: (.*)$", recipe_text(name), re.MULTILINE)[1]
    prompt = {"prompt_tokens": longest_prompt_at_hand(settings) or assumed_prompt(settings)}
    if settings.model.name in ("tiny-arithmetic", "smollm2-words"):  # on a CPU
        model = MODELS.get(settings.model.name, settings.model.name)
        least, quickest = (plan(model, settings, size * GIB, "cpu", **prompt) for size in (4, 64))
        assert least.fits and least.peak == quickest.peak, "4 GiB are room for its quickest sizes"
        assert said == f"{quickest.peak / GIB:.1f} GiB beside what Python and torch take."
        return
    plans = {size: plan(MODELS[settings.model.name], settings, size * GIB, "cuda", **prompt) for size in GPUS}
    size = next(size for size, planned in plans.items() if planned.fits)
    quickest = plan(MODELS[settings.model.name], settings, 80 * GIB, "cuda", **prompt)
    assert said == (
        f"{plans[size].peak / GIB:.1f} GiB on a GPU of {size} GiB, the smallest that it fits; "
        f"{quickest.peak / GIB:.1f} GiB at its quickest."
    )


# The command


def test_a_plan_needs_neither_weights_nor_torch(test_data):
    config = test_data / "qwen2_1.5b_config" / "config.json"
    command = ["plan", "svamp-qwen2-1.5b", f"model.name={config}", "--for", "6GiB,8GiB"]
    code = f"import sys; from twig.cli.app import main; status = main({command!r})\n"
    code += "heavy = ('torch', 'transformers', 'datasets', 'peft', 'huggingface_hub', 'pandas')\n"
    code += "sys.exit(status or ' '.join(name for name in heavy if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("6GiB", "8GiB"))]
    assert [row[5] for row in rows] == ["yes", "yes"]


def test_devices_are_compared_and_the_small_one_is_told_what_to_change(test_data, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    folder = str(test_data / "qwen2_1.5b_config")
    command = (
        f"plan gsm8k-qwen3-1.7b model.name={folder} model.dtype=float32 lora.layers=all --for 6GiB,24GiB"
    )
    assert main(command.split()) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"{folder} on a CUDA GPU, ")
    assert "320 tokens" in heading and "--prompt-tokens N" in heading
    assert all(len(line) <= 80 for line in lines)
    assert "peak, GiB  loading  sampling  update  evaluation  fits" in "\n".join(lines)
    assert [line.split()[5] for line in lines if line.startswith(("6GiB ", "24GiB "))] == ["no", "yes"]
    start = next(i for i, line in enumerate(lines) if line.startswith("6GiB: "))
    assert lines[start + 1].split()[:1] == ["model.dtype=bfloat16"]


def test_the_plan_of_a_run_can_be_written_into_its_settings(tmp_path, capsys):
    assert main(["train", "quickstart", "--dry-run", "train.pack_size=512"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(shown)
    assert load(str(tmp_path / "mine.yaml")) == load("quickstart", ["train.pack_size=512"])
    assert re.search(r"^# together +\d+ +\d+ +\d+ +\d+$", shown, re.MULTILINE)
    assert re.search(r"^# +train.pack_size +512 +as set$", shown, re.MULTILINE)
    assert re.search(r"^# +rollout.wave_size +128$", shown, re.MULTILINE)


def test_a_dry_run_without_a_config_at_hand_says_so(capsys):
    assert main(["train", "svamp-qwen2-1.5b", "model.name=nobody/nothing", "--dry-run"]) == 0
    assert re.search(r"^# .*model\.name: .*nobody/nothing", capsys.readouterr().out, re.MULTILINE)


def test_without_a_network_a_plan_ends_at_once(monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub import constants

    def never(*arguments, **options):
        raise AssertionError("its retries take half a minute")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.setattr("twig.planner.model_shape.reachable", lambda: False)
    assert main(["plan", "svamp-qwen2-1.5b", "model.name=nobody/nothing"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "model.name: " in shown and "nobody/nothing" in shown


def test_a_broken_config_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 4}))
    assert main(["plan", "quickstart", f"model.name={tmp_path}"]) == 2
    assert "'mamba'" in capsys.readouterr().err
