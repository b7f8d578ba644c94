"""Memory on a CUDA device: a limit that holds, running out for real and going on with the same results, and
peaks as they were predicted.
"""

import gc

import numerics
import numpy as np
import pytest
import tiny
import torch
from gradients import credit_of
from running_out import Heard, gradient_of
from saved import build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

import twig
from twig.common.errors import UserError
from twig.config.sizes import Sizes
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.planner.phases import CUDA_OUTSIDE
from twig.runtime.memory_use import PeakMemory

pytestmark = pytest.mark.gpu
PRECISIONS = ["bfloat16"]
MIB = 2**20
SEED = 3


@pytest.fixture(autouse=True)
def _empty(cuda):
    """No test begins with what another one left, not even with the workspaces of cuBLAS."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    yield
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0, "every limit has ended"


def bytes_like(size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")


# The limit


def test_a_limit_holds_until_it_ends():
    there = torch.cuda.memory_reserved()
    with PeakMemory("cuda") as memory:
        memory.limit(there + 256 * MIB)
        kept = bytes_like(64 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            bytes_like(512 * MIB)
        del kept
        bytes_like(250 * MIB)  # what was kept without need makes room
    bytes_like(512 * MIB)


def test_a_budget_is_kept_by_the_whole_run_and_ends_with_it(base, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_reserved()
    run = train(base, tmp_path / "run", "memory.budget=3GiB")
    assert run.summary["status"] == "finished"
    assert torch.cuda.max_memory_reserved() <= there + 3 * 1024 * MIB - CUDA_OUTSIDE


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_loaded(base, tmp_path):
    """CUDA itself and half of the weights."""
    budget = f"{CUDA_OUTSIDE // MIB + 100}MiB"
    with pytest.raises(UserError, match=rf"^memory\.budget: {budget} is too little: "):
        train(base, tmp_path / "run", f"memory.budget={budget}")


# Running out


def wide_policy(decode):
    """A policy whose logits are large beside its weights, and its activations beside its gradients."""
    shape = {"hidden_size": 256, "intermediate_size": 2048, "vocab_size": 50_000}
    shape |= {"max_position_embeddings": 1024}
    model = tiny.build_model(dtype=torch.float32, **shape)
    lora = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "layers": "all"}
    return Policy(tiny.with_random_b(attach(model, **lora)), decode=decode)


def limited(run, share):
    """What `run` returns with `share` of the memory that it took above what was there."""
    gc.collect()
    torch.cuda.empty_cache()
    there = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run()
    gc.collect()
    torch.cuda.empty_cache()
    most = torch.cuda.max_memory_allocated()
    assert most > there + 64 * MIB, "the test needs something that can run out"
    with PeakMemory("cuda") as memory:
        memory.limit(round(there + share * (most - there)))
        return run()


@pytest.mark.parametrize("decode", ["graph", "plain"])
def test_float32_sampling_runs_out_and_goes_on_with_the_same_tokens(decode):
    policy = wide_policy(decode)
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(3, 50_000, 12), 16, 12, slot) for slot in range(8)]

    def draw():
        actual = sample(policy, requests, SamplingParams([1], texts, seed=SEED, wave_size=128))
        policy.release()
        return actual

    whole, again = draw(), limited(draw, 0.6)
    assert again.wave_size < 128 == whole.wave_size
    same = numerics.assert_same_text(policy, requests, again.completions, whole.completions, SEED)
    ours, theirs = ([c for each in actual.completions for c in each] for actual in (again, whole))
    for one, other, length in zip(ours, theirs, same, strict=True):
        numerics.assert_values(one.logps[:length], other.logps[:length])


def texts(rows):
    return ["" for _ in rows]


def batch():
    """A batch of 4 groups of 8 completions of 100 tokens that share little."""
    rng, groups = np.random.default_rng(0), []
    for index in range(4):
        completions = [rng.integers(3, 50_000, 100) for _ in range(8)]
        groups.append(tiny.make_group(rng.integers(3, 50_000, 20), completions, rng.random(8), index))
    return (groups, *credit_of(groups))


def test_float32_an_update_runs_out_and_goes_on_with_the_same_gradient():
    policy, parts, heard = wide_policy("plain"), batch(), Heard()

    def update():
        sizes = Sizes(128, 4096, 2**22, False)
        return gradient_of(policy, parts, sizes, heard)

    whole, _ = update()
    policy.checkpoint_layers, policy.head_chunk = False, 2**22
    again, passes = limited(update, 0.6)
    assert heard.said and all("memory ran out in an update" in said for said in heard.said)
    assert len(passes.packs) > 1
    numerics.assert_same(again, whole)


def test_float32_what_sampling_keeps_is_given_up_for_the_update():
    """With it there is too little for the packs as they are, and without it enough."""
    policy, parts, heard = wide_policy("graph"), batch(), Heard()
    requests = [Request(np.arange(3, 15), 64, 12, slot) for slot in range(4)]

    def update():
        return gradient_of(policy, parts, Sizes(256, 1024, 2**20, False), heard)[0]

    whole = update()
    sample(policy, requests, SamplingParams([1], texts, wave_size=256))
    assert policy.decode_steps.steps, "kept for the next wave"
    gc.collect()
    torch.cuda.empty_cache()
    with PeakMemory("cuda") as memory:
        memory.limit(torch.cuda.memory_reserved() + 16 * MIB)
        again = update()
    assert not policy.decode_steps.steps and not heard.said
    numerics.assert_same(again, whole)


# Predictions


@pytest.fixture
def base(cuda, tmp_path):
    """The folder of a random model of 100 million weights with a tokenizer."""
    folder, tokenizer = tmp_path / "base", build_tokenizer()
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(), torch.device(numerics.place()):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alternate(completions, **columns):
    return [float(i % 2) for i in range(len(completions))]


def train(base, folder, *words):
    """Two steps and an evaluation whose completions are as long as they may be."""
    settings = {
        "model": {"name": str(base), "dtype": "bfloat16"},
        "task": {"name": "custom", "chat": "never"},
        "algorithm": {"name": "grpo"},
        "rollout": {
            "num_generations": 8,
            "prompts_per_step": 8,
            "max_completion_length": 128,
            "suppress_tokens": [1],
        },
        "train": {"max_steps": 2, "max_grad_norm": 1.0},
        "eval": {"before": False},
        "log": {"progress": "quiet"},
    }
    data = [{"prompt": "a" * 60}] * 32
    return twig.train(
        twig.Settings.from_dict(settings, words),
        reward_funcs=alternate,
        train_dataset=data,
        eval_dataset=data,
        output=folder,
    )


CASES = {
    "grpo": (),
    "s-grpo, large waves": (
        "algorithm.name=s-grpo",
        "algorithm.alpha=0",
        "algorithm.p=0.5",
        "algorithm.k=64",
        "rollout.num_generations=25",
    ),
    "all layers": ("lora.layers=all",),
    "layers checkpointed": ("lora.layers=all", "train.checkpoint_layers=true", "train.pack_size=4096"),
    "plain decoding": ("rollout.decode=plain",),
}


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(case, base, tmp_path):
    run = train(base, tmp_path / "run", *CASES[case])
    measured, predicted = (run.summary[key] for key in ("peak_memory_bytes", "predicted_peak_bytes"))
    assert 0.9 < predicted / measured < 1.1, (measured / MIB, predicted / MIB)
