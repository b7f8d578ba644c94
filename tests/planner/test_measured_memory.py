"""The planner: weights and activations counted exactly, phases added up, budgets respected."""

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from gradients import credit_of, scored, texts_of
from transformers import AutoModelForCausalLM

from twig.cli.app import main
from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES
from twig.engine.decoder import Decoder
from twig.engine.load import load_model, load_tokenizer
from twig.engine.pack import build_packs
from twig.engine.sampler import Request, SamplingParams, sample
from twig.engine.update import Passes
from twig.evaluation.evaluate import evaluate_policy as evaluate
from twig.evaluation.evaluate import measure_model
from twig.planner import choose
from twig.planner.choose import Machine, size_run
from twig.planner.layer_costs import DecodeTable, Table, Wave, decode_buffers, kept_by_layer, last_queries
from twig.planner.model_shape import Shape
from twig.planner.phases import CUDA_OUTSIDE
from twig.planner.plan import workload_of
from twig.runtime.machine import free_memory
from twig.runtime.memory_use import CUDA_CONTEXT, PeakMemory, trim_freed_memory
from twig.tasks.load import load_task
from twig.training.trainer import Trainer

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def settings_of(*overrides):
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
    return Settings.from_dict(values, overrides)


def config_of(family):
    name, extra = tiny.FAMILIES[family]
    return getattr(transformers, name)(**tiny.SHAPE | extra)


def shape_of(config):
    return Shape.from_config(json.loads(config.to_json_string()))


# Weights


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_those_of_the_model(family):
    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(shape_of(config).parameters().values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", tiny.SHARING)
def test_layers_that_share_keys_are_counted_as_the_engine_records_them(family):
    """What is recorded of a token, wherever the trunk ends; and the weights, but for a norm a layer."""
    name, extra = tiny.SHARING[family]
    shape = shape_of(getattr(transformers, name)(**tiny.SHAPE | extra))
    model = tiny.build_model(family)
    decoder = Decoder(model)
    cuts = range(1, shape.layers)
    assert [shape.boundary(cut) for cut in cuts] == [decoder.trunk(cut).width for cut in cuts]
    weights = sum(p.numel() for p in model.parameters())
    assert 0.96 * weights <= sum(shape.parameters().values()) <= weights


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma2", "Gemma3Text", "Granite"])
def test_what_a_config_leaves_out_is_what_its_class_has(name):
    """A config.json may have nothing but the sizes; biases, head width and tied embeddings then follow."""
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    keys = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
    short = {key: getattr(config, key) for key in [*keys.split(), "num_key_value_heads"]}
    assert sum(Shape.from_config(short).parameters().values()) == sum(p.numel() for p in model.parameters())


# What autograd keeps


def saved_bytes(policy, pack, opened=None):
    """Bytes of the different storages that the backward pass of a pack keeps, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in policy.peft_model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy._target_logps(pack, None, opened)
    return sum(size for size, _ in saved.values())


def kept_by_pack(work, table):
    """Counts the bytes that the backward pass needs of a table, without the keys and values of its stem."""
    shape, top, queries = work.shape, work.shape.layers - 1, last_queries(work, table)
    layers = sum(
        kept_by_layer(work, table, i > work.cut, queries if i == top else None).both
        for i in range(work.cut, shape.layers)
    )
    attends = not work.modules.isdisjoint({"q_proj", "k_proj", "v_proj"})

    def shared(numbers, columns):
        """Masks, one a window, and rotary embeddings; eager attention keeps only a softmax of the mask."""
        windows = {shape.windows[i] for i in numbers if attends or i > work.cut}
        masks = 0 if work.eager else len(windows) * table.keys
        rotary = (2 if shape.per_type_rotary else 1) * 2 * shape.head_dim
        return work.element * table.rows * columns * (masks + rotary)

    if queries is None:
        layers += shared(range(work.cut, top + 1), table.columns)
    else:
        layers += shared(range(work.cut, top), table.columns) + shared([top], queries)
    # The norm's input, and the gradient of log Z by it.
    head = table.head * (shape.hidden * (4 + work.wide) + 4) + work.wide * table.targets
    return layers + head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("k_proj", "o_proj"), MLP, ATTENTION + MLP])
@pytest.mark.parametrize("family, attention", [*((f, None) for f in tiny.FAMILIES), ("qwen2", "eager")])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(family, attention, modules, dtype):
    attention = attention or ("sdpa" if tiny.has_sdpa(family) else "eager")
    policy = tiny.build_policy(
        family, attention, getattr(torch, dtype), layers=[1, 2, 3], target_modules=modules
    )
    group = tiny.random_group(np.random.default_rng(0), prompt_length=8, size=8, longest=16)
    tries, credits = credit_of([group])
    (pack,) = build_packs(scored([group], tries, credits), 4096)
    settings = settings_of(
        "lora.layers=[1,2,3]",
        f"lora.target_modules=[{','.join(modules)}]",
        "lora.r=4",
        f"model.dtype={dtype}",
        f"model.attn_implementation={attention}",
    )
    work = workload_of(shape_of(policy.model.config), settings, "cpu", 8)
    widest = np.bincount(pack.rows // pack.ids.shape[1]).max()
    table = Table(*pack.ids.shape, 0, len(pack.rows), len(pack.targets), int(widest))
    predicted = kept_by_pack(work, table)
    assert predicted == pytest.approx(saved_bytes(policy, pack), rel=0.01)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_what_is_kept_behind_a_stem_that_groups_share_is_what_autograd_saves(family):
    attention = "sdpa" if tiny.has_sdpa(family) else "eager"
    policy = tiny.build_policy(family, attention, torch.float32, layers=[1, 2, 3])
    draw = np.random.default_rng(0)
    text = draw.integers(3, tiny.VOCAB, 12)
    groups = [tiny.random_group(draw, size=8, longest=16, index=n) for n in range(3)]
    groups = [replace(group, prompt_ids=np.append(text, 3 + n)) for n, group in enumerate(groups)]
    (pack,) = build_packs(scored(groups, *credit_of(groups)), 4096, least_saved=1)
    assert len(pack.ids) > 1 and pack.stem.shared
    opened = policy.open_stem(pack.stem, None, gradient=True)
    settings = settings_of("lora.layers=[1,2,3]", "lora.r=4", f"model.attn_implementation={attention}")
    work = workload_of(shape_of(policy.model.config), settings, "cpu", 8)
    widest = np.bincount(pack.rows // pack.ids.shape[1]).max()
    table = Table(*pack.ids.shape, len(pack.stem), len(pack.rows), len(pack.targets), int(widest))
    assert kept_by_pack(work, table) == pytest.approx(saved_bytes(policy, pack, opened), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("k_proj", "o_proj"), ATTENTION + MLP])
def test_what_dora_keeps_for_the_backward_pass_is_what_autograd_saves(modules, dtype):
    """The adapter multiplied out has a graph too, which ends with the module: an identity, and A of it."""
    policy = tiny.build_policy(
        "llama", "sdpa", getattr(torch, dtype), layers=[1, 2, 3], target_modules=modules, use_dora=True
    )
    group = tiny.random_group(np.random.default_rng(0), prompt_length=8, size=8, longest=16)
    tries, credits = credit_of([group])
    (pack,) = build_packs(scored([group], tries, credits), 4096)
    words = ["lora.layers=[1,2,3]", f"lora.target_modules=[{','.join(modules)}]", "lora.r=4"]
    settings = settings_of(*words, "lora.use_dora=true", f"model.dtype={dtype}")
    work = workload_of(shape_of(policy.model.config), settings, "cpu", 8)
    widest = np.bincount(pack.rows // pack.ids.shape[1]).max()
    table = Table(*pack.ids.shape, 0, len(pack.rows), len(pack.targets), int(widest))
    widths = [work.shape.linear()[name].inputs for name in modules]
    ended = 3 * sum(4 * width * (width + 4) for width in widths)
    assert kept_by_pack(work, table) == pytest.approx(saved_bytes(policy, pack) - ended, rel=0.02)


# What sampling by captured steps keeps


@pytest.mark.parametrize(("greedy", "num"), [(False, 3), (True, 1)])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_what_a_decode_step_keeps_is_counted(family, greedy, num):
    """With a prompt's keys and values held once for all of its rows, and with one row of each."""
    policy = tiny.build_policy(family, dtype=torch.float32, decode="graph")
    requests = [Request(np.arange(3, 3 + n), num, 9, slot) for slot, n in enumerate((4, 2, 3))]
    sample(policy, requests, SamplingParams([1], texts_of, greedy=greedy, record=not greedy))
    (step,) = policy.decode_steps.steps.values()
    work = workload_of(shape_of(policy.model.config), settings_of("lora.layers=last_third"), "cuda", 4)
    work = replace(work, element=4)
    table = DecodeTable.of(Wave(3, num), 4, 9, not greedy)
    assert (table.prompts, table.each, table.slots, table.length) == (
        step.shape.prompts,
        step.shape.rows,
        step.shape.slots,
        step.shape.length,
    )
    assert step.shape.shared == (num > 1)
    assert decode_buffers(work, table) == pytest.approx(bytes_of(step), rel=0.01)


def bytes_of(step):
    """Bytes of the tensors that a decode step holds, of each once."""
    tensors = [value for value in vars(step).values() if isinstance(value, torch.Tensor)]
    tensors += [x for pair in step.rotary.values() for x in pair]
    tensors += [x for cache in step.caches for x in (*(cache.prompt or ()), *cache.own)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


# The command


def test_the_plan_of_this_machine_is_shown_item_by_item(capsys):
    assert main(["plan", "quickstart"]) == 0
    shown = capsys.readouterr().out
    assert "tiny-arithmetic on a CPU, prompts of up to 7 tokens\n" in shown
    assert re.search(r"^MiB at the peak of .*loading +sampling +update +evaluation", shown, re.MULTILINE)
    assert re.search(r"^together( +[\d,.]+){4}", shown, re.MULTILINE)
    assert re.search(r"^Fits: \d+ MiB of [\d.]+ GiB\.", shown, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory of Linux")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    """Which is what getrusage says on Linux."""
    code = "from twig.runtime.memory_use import PeakMemory; print(PeakMemory('cpu').peak())"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(started.stdout) < PeakMemory("cpu").now() / 2


def test_the_predicted_peak_is_the_plan_above_what_is_there(monkeypatch):
    values = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication", "eval_size": 4}}
    settings = Settings.from_dict(values)
    task = load_task(settings)
    memory = PeakMemory("cpu")
    monkeypatch.setattr(memory, "now", lambda: 10**9)
    tokenizer = load_tokenizer(settings.model)
    chosen = size_run(settings, task, tokenizer, None, Machine(memory), strict=True)
    assert chosen.peak == 10**9 + chosen.plan.peak
    model, _ = load_model(settings.model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    passed = size_run(settings, task, tokenizer, model, Machine(memory), strict=True)
    assert passed.peak == 10**9 - weights + passed.plan.peak, "the weights are there, and in the plan"


def test_prompts_that_a_run_does_not_reach_do_not_count(monkeypatch):
    """Two steps of three prompts: those that training draws first. An evaluation has its own."""
    settings = settings_of("train.max_steps=2", "rollout.prompts_per_step=3", "eval.limit=2")
    task = replace(load_task(settings), prompt_template=None)
    train = [replace(task.train[0], prompt="1" * (n + 1)) for n in range(40)]
    task = replace(task, train=train, eval=[replace(train[0], prompt="1" * n) for n in (50, 7, 90)])
    order = Trainer._order.__wrapped__(SimpleNamespace(settings=settings, task=task), 0)
    asked, real = {}, choose.choose_sizes
    monkeypatch.setattr(choose, "choose_sizes", lambda *a, **k: asked.update(k) or real(*a, **k))

    def sized(*overrides):
        chosen = settings.with_overrides(list(overrides))
        return size_run(
            chosen, task, load_tokenizer(chosen.model), None, Machine(PeakMemory("cpu")), strict=True
        )

    assert sized().longest_prompt == 50
    assert (asked["prompt_tokens"], asked["questions"]) == (max(order[:6]) + 1, [7, 50])
    sized("algorithm.replay.probability=0.5")
    assert asked["prompt_tokens"] == sorted(order[:6] + 1)
    sized("rollout.redraw=1")
    assert asked["prompt_tokens"] == max(order[:12]) + 1
    sized("train.max_steps=14")
    assert asked["prompt_tokens"] == 40


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory of Linux")
def test_what_is_free_in_the_heap_is_returned():
    """Blocks of 100 KB are cut from the heap, and what follows them keeps it from shrinking by itself."""
    memory = PeakMemory("cpu")
    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
    after = bytearray(b"x" * 100_000)
    del blocks
    before = memory.now()
    trim_freed_memory()
    assert before - memory.now() > 50e6
    assert len(after) == 100_000


RETURNED = """
import ctypes
from twig.runtime.memory_use import PeakMemory, return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = PeakMemory("cpu")

def left(size):
    # the bytes that stay in use after a block between others was written and freed
    block, behind = libc.malloc(size), libc.malloc(100_000)
    ctypes.memset(block, 1, size)
    full = memory.now()
    libc.free(block)
    now = memory.now()
    libc.free(behind)
    return size - (full - now)

return_freed_memory(2**20)
print(left(8 * 2**20))
return_freed_memory()  # as sampling and updates do
print(left(8 * 2**20))
return_freed_memory(2**24, for_good=True)
print(left(8 * 2**20))
return_freed_memory()
print(left(20 * 2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory of Linux")
def test_large_blocks_are_returned_at_once():
    """Whatever size glibc has chosen by itself: it raises it with every larger block that is freed.

    In a new process: a block that fits a gap of the heap is cut from it, and earlier tests leave some.
    """
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library")
    done = subprocess.run([sys.executable, "-c", RETURNED], check=True, capture_output=True, text=True)
    small, default, kept, above = map(int, done.stdout.split())
    assert max(small, default, above) < 2**20
    assert kept > 7 * 2**20


def test_sampling_and_an_update_return_what_they_freed(monkeypatch):
    policy, calls = tiny.build_policy("qwen2", dtype=torch.float32), []
    for name in ("sampler", "update"):
        monkeypatch.setattr(f"twig.engine.{name}.trim_freed_memory", lambda name=name: calls.append(name))
    sample(policy, [Request(np.arange(3, 7), 2, 4, 0)], SamplingParams([1], texts_of))
    group = tiny.random_group(np.random.default_rng(0), prompt_length=8, size=4, longest=6)
    Passes(policy, DEFAULT_SIZES, Progress(), scored([group], *credit_of([group])), None).logps()
    assert calls == ["sampler", "update"]


def test_sampling_from_a_large_vocabulary_returns_what_it_freed_on_the_way(monkeypatch):
    """At every second token: small blocks that come out of all gaps in the heap make all of it resident."""
    policy, calls = tiny.build_policy("qwen2", dtype=torch.float32), []
    monkeypatch.setattr("twig.engine.sampler.trim_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr("twig.engine.sampler._TRIMMED_FROM", 0)
    no_end = SamplingParams([], texts_of)
    sample(policy, [Request(np.arange(3, 7), 2, 8, 0)], no_end)
    assert len(calls) == 8 // 2 + 1  # and at the end


# A budget on a CUDA device, with a device that is not there

GIB = 2**30


class Cuda(SimpleNamespace):
    """What torch.cuda says of a device of 8 GiB; `shares` are those that it was limited to."""

    def __init__(self, free=6 * GIB, allocated=0, reserved=0, share=1.0):
        super().__init__(free=free, allocated=allocated, reserved=reserved, shares=[share])

    def is_available(self):
        return False

    def current_device(self):
        return 0

    def mem_get_info(self, device):
        return self.free, 8 * GIB

    def memory_allocated(self, device):
        return self.allocated

    def memory_reserved(self, device):
        return self.reserved

    def max_memory_allocated(self, device):
        return self.allocated

    def reset_peak_memory_stats(self, device):
        pass

    def get_per_process_memory_fraction(self, number):
        return self.shares[-1]

    def set_per_process_memory_fraction(self, share, number):
        assert isinstance(number, int) and isinstance(share, float) and 0 <= share <= 1, "torch refuses these"
        self.shares.append(share)


def size_on(monkeypatch, cuda, *overrides, model=None, device="cuda", strict=True):
    """Sizes a run on the device; the run is over when this returns."""
    monkeypatch.setattr(torch, "cuda", cuda)
    settings = settings_of("task.eval_size=4", *overrides)
    with PeakMemory(device) as memory:
        tokenizer = load_tokenizer(settings.model)
        return size_run(settings, load_task(settings), tokenizer, model, Machine(memory), strict=strict)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_written_budget_is_a_limit_until_the_run_ends(device, monkeypatch):
    """Torch may take what the context, which the budget includes, leaves of it."""
    cuda = Cuda()
    size_on(monkeypatch, cuda, "memory.budget=4GiB", device=device)
    assert cuda.shares == [1.0, (4 * GIB - CUDA_OUTSIDE) / (8 * GIB), 1.0]


def test_auto_is_no_limit(monkeypatch):
    cuda = Cuda()
    size_on(monkeypatch, cuda)
    assert cuda.shares == [1.0]


def test_a_share_is_one_of_what_is_free_with_what_the_context_took_of_it(monkeypatch):
    """8 GiB: 6 free, 1 reserved and half of that in use, 1 outside torch, the context among it."""
    cuda = Cuda(free=6 * GIB, reserved=GIB, allocated=GIB // 2)
    size_on(monkeypatch, cuda, "memory.budget=0.5")
    free = 6 * GIB + GIB // 2 + CUDA_CONTEXT
    assert cuda.shares[1] == pytest.approx((GIB // 2 + 0.5 * free - CUDA_OUTSIDE) / (8 * GIB))
    assert free_memory("cuda", torch) == 6 * GIB + GIB // 2, "what torch keeps without need is free"


def test_what_was_there_before_is_not_the_runs_but_the_model_is(monkeypatch):
    model, _ = load_model("tiny-arithmetic")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cuda = Cuda(allocated=GIB + weights, reserved=GIB + weights)
    chosen = size_on(monkeypatch, cuda, "memory.budget=3GiB", model=model)
    assert cuda.shares[1] == (4 * GIB - CUDA_OUTSIDE) / (8 * GIB)
    assert chosen.peak == GIB + chosen.plan.tensors_peak


def test_a_limit_never_widens_one_that_is_there_and_ends_with_an_error_too(monkeypatch):
    cuda = Cuda(share=0.25)
    size_on(monkeypatch, cuda, "memory.budget=4GiB")
    assert cuda.shares == [0.25, 0.25, 0.25]
    with pytest.raises(KeyError), PeakMemory("cuda") as memory:
        memory.limit(GIB)
        memory.limit(2 * GIB)
        raise KeyError
    assert cuda.shares[3:] == [0.125, 0.25, 0.25]


def test_a_budget_below_the_context_is_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^memory\.budget: 500MiB .*memory\.budget=6GiB"):
        size_on(monkeypatch, Cuda(), "memory.budget=500MiB", strict=False)


def test_elsewhere_nothing_is_limited(monkeypatch):
    monkeypatch.setattr(torch, "cuda", None)
    with PeakMemory("cpu") as memory:
        memory.limit(1)
        assert memory.context() == 0


def test_an_evaluation_keeps_to_the_budget_too(monkeypatch):
    """Until its last answer, and not after it."""
    limits = []
    monkeypatch.setattr(PeakMemory, "__exit__", lambda self, *error: limits.append("left"))
    monkeypatch.setattr(
        "twig.evaluation.evaluate.evaluate_policy",
        lambda *a, **k: limits.append("answers") or evaluate(*a, **k),
    )
    measure_model(settings_of("task.eval_size=2", "memory.budget=2GiB", "rollout.max_completion_length=2"))
    assert limits == ["answers", "left"]
