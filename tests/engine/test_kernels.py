"""Frozen products through oneDNN against torch's own: values, gradients, and a model that stays as it was."""

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gradients import credit_of, engine_gradient, groups_of, requests_of, texts_of
from peft import LoraConfig, get_peft_model
from project import ROOT
from saved import save_model
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GPT2Config

from twig.common.errors import UserError
from twig.core.algorithms.base import Objective
from twig.engine import kernels
from twig.engine.kernels import (
    FEW_ROWS,
    PACKED_AFTER,
    Choice,
    Packed,
    Speeds,
    choose_kernels,
    linear,
    onednn_products,
)
from twig.engine.policy import Policy
from twig.engine.sampler import SamplingParams, sample

pytestmark = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))
MATRICES = [(896, 896), (896, 4864)]


class Watched(TorchFunctionMode):
    """Fails if the operator is called with a tensor that needs a gradient, which would get none."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "linear_pointwise" in str(func):
            self.calls += 1
            asked = any(isinstance(each, torch.Tensor) and each.requires_grad for each in args)
            assert not (torch.is_grad_enabled() and asked), "autograd would lose this gradient"
        return func(*args, **(kwargs or {}))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected):
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * (size + 1))


# ---- one product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 40), (1, 40), (3, 5, 40), (2, 3, 5, 40), (0, 40), (2, 0, 40), (40,)])
def test_a_product_and_its_gradient_are_those_of_the_plain_layer(shape, bias):
    weight, offset = random(24, 40, seed=1), random(24, seed=2) if bias else None
    ours, plain = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    with Watched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = linear(ours, weight, offset)
        result.pow(2).sum().backward()
    expected = torch.nn.functional.linear(plain, weight, offset)
    expected.pow(2).sum().backward()
    assert_near(result, expected)
    assert_near(ours.grad, plain.grad)


def test_any_strides_are_served():
    weight = random(24, 40, seed=1)
    x = random(40, 9).t().requires_grad_()
    result = linear(x, weight.t().contiguous().t())  # a transposed view of a transposed copy
    assert_near(result, x @ weight.t())
    result.sum().backward()  # the gradient of a sum is expanded: it has strides of 0
    assert_near(x.grad, torch.ones(9, 24) @ weight)


def test_another_dtype_runs_as_before():
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = random(4, 8).to(dtype), random(5, 8, seed=1).to(dtype)
        assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(random(4, 8), random(5, 8, seed=1)).dtype is torch.bfloat16


def test_a_trained_weight_or_bias_keeps_its_gradient():
    x, weight, bias = random(4, 8), random(5, 8, seed=1).requires_grad_(), random(5, seed=2).requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None and bias.grad is not None
    linear(x, weight.detach(), bias).sum().backward()


def test_the_operator_is_named_in_one_place():
    # Called under autograd it gives no gradient; only kernels.py calls it.
    files = [p for p in (ROOT / "src").rglob("*.py") if "_linear_pointwise" in p.read_text(encoding="utf-8")]
    assert [path.name for path in files] == ["kernels.py"]


def test_the_watch_sees_the_bare_operator():
    x = random(3, 8).requires_grad_()
    with pytest.raises(AssertionError, match="lose this gradient"), Watched():
        torch.ops.mkldnn._linear_pointwise(x, random(5, 8), None, "none", [], "")


@pytest.mark.parametrize("inputs, outputs", [(576, 192), (128, 512), (100, 33), (31, 17)])
def test_packed_weights_give_the_same_bits(inputs, outputs, monkeypatch):
    layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    packed = Packed()
    monkeypatch.setattr(kernels, "PACKED_AFTER", 0)
    for rows in (1, 2, 7, 16, 33, FEW_ROWS, FEW_ROWS + 1):
        x = random(rows, inputs, seed=rows)
        with torch.no_grad(), onednn_products([layer]):
            ordinary = layer(x)
        with torch.no_grad(), onednn_products([layer], packed):
            assert torch.equal(layer(x), ordinary)
    assert packed.clear() and not packed.clear()


def test_a_copy_is_made_when_it_pays():
    packed, weight = Packed(), random(8, 8)
    assert all(packed.of(weight) is None for _ in range(PACKED_AFTER))
    assert packed.of(weight) is packed.of(weight.view(8, 8)) is not None, "tied weights share one"
    assert packed.of(weight[:4]) is None, "part of a matrix begins where the whole does"
    assert packed.clear()
    assert packed.of(weight) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as on Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_ever_new_shapes_do_not_fill_the_memory(dtype, tmp_path):
    # Each compiled product takes 0.6 MiB; without a limit 1,024 are kept, twice.
    save_model(tmp_path)
    code = f"""
import ctypes, torch
from pathlib import Path
from twig.engine.kernels import linear
from twig.engine.load import load_model
load_model({str(tmp_path)!r})
def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
weight = torch.ones(96, 64, dtype=torch.{dtype})
def multiply(rows):
    with torch.no_grad():
        linear(torch.ones(rows, 64, dtype=weight.dtype), weight)  # bfloat16 is torch's own, by oneDNN
for rows in range(2, 100):
    multiply(rows)
before = resident()
for rows in range(100, 500):
    multiply(rows)
print(resident() - before)
"""
    clean = {name: value for name, value in os.environ.items() if "_CACHE_CAPACITY" not in name}
    ran = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert float(ran.stdout.splitlines()[-1]) < 40


# ---- a model's layers


def test_only_frozen_plain_layers_are_changed_and_only_inside():
    class Own(torch.nn.Linear):
        """A subclass may compute anything."""

    frozen, own = torch.nn.Linear(8, 8).requires_grad_(False), Own(8, 8).requires_grad_(False)
    hooked = torch.nn.Linear(8, 8).requires_grad_(False)
    hooked.forward = lambda x: x  # as accelerate's hooks do
    half = torch.nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
    others = [torch.nn.Linear(8, 8), own, half]
    with pytest.raises(KeyError), onednn_products([frozen, hooked, *others]):
        assert "forward" in vars(frozen) and not any("forward" in vars(each) for each in others)
        with onednn_products([frozen]):
            pass
        assert "forward" in vars(frozen), "the inner context leaves the outer one's"
        raise KeyError
    assert "forward" not in vars(frozen) and hooked.forward(1) == 1


CASES = {
    "biases": ("qwen2", {}),
    "tied": ("qwen2-tied", {}),
    "soft cap": ("gemma2", {"attention": "eager"}),
    "scales": ("granite", {}),
    "checkpointed": ("qwen2", {"checkpoint_layers": True}),
    "all layers": ("qwen2", {"layers": "all", "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "plain engine": ("qwen2", {"engine": "plain"}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_has_the_gradient_of_the_plain_layers(case):
    family, options = CASES[case]
    groups, gradients = groups_of(), []
    tries, credits = credit_of(groups, beta=0.1)
    for kind in ("torch", "onednn"):
        policy = tiny.build_policy(family, dtype=torch.float32, kernels=kind, **options)
        watch = Watched()
        with watch if kind == "onednn" else nullcontext(), policy.computing(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*autograd kernel.*")
            gradients.append(engine_gradient(policy, groups, tries, credits, Objective(beta=0.1), size=20))
        assert (watch.calls > 0) == (kind == "onednn")
    (loss, plain), (other, ours) = gradients
    assert loss == pytest.approx(other, rel=1e-5)
    assert plain.keys() == ours.keys()
    largest = max(float(g.abs().max()) for g in plain.values())
    for name, gradient in plain.items():
        assert float((ours[name] - gradient).abs().max()) < 1e-4 * largest


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_layers_under_an_adapter_keep_their_gradient(family, dora):
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=tiny.VOCAB, n_positions=32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, modules = AutoModelForCausalLM.from_config(config).eval(), ["c_attn"]
    else:
        model, modules = tiny.build_model(dtype=torch.float32), ["q_proj"]
    lora = LoraConfig(r=4, target_modules=modules, use_dora=dora, fan_in_fan_out=family == "gpt2")
    model = tiny.with_random_b(get_peft_model(model, lora).eval())
    ids = torch.arange(3, 15)[None]
    results = []
    for context in (nullcontext(), onednn_products(model.modules())):
        with context:
            loss = model(input_ids=ids, labels=ids).loss
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append([loss, *torch.autograd.grad(loss, trained)])
    for ours, plain in zip(*results, strict=True):
        assert_near(ours, plain)


def test_quantised_layers_are_left_alone():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, compute_dtype=torch.float32).requires_grad_(False)
    with onednn_products([layer]):
        assert "forward" not in vars(layer)


# ---- sampling


class Counting:
    """Counts the products of a policy with packed weights."""

    def __init__(self, policy):
        self.made = 0
        if policy.packed is not None:
            self.of, policy.packed.of = policy.packed.of, self.count

    def count(self, weight):
        copied = self.of(weight)
        self.made += copied is not None
        return copied


def drawn(policy):
    params = SamplingParams([tiny.END], texts_of, max_completion_length=12)
    result = sample(policy, requests_of(), params)
    return [c for group in result.completions for c in group], result.boundary


@pytest.mark.parametrize("engine", ["trie", "plain"])
def test_packed_weights_sample_the_same_bits_and_are_freed(engine, monkeypatch):
    monkeypatch.setattr(kernels, "PACKED_AFTER", 3)
    numbers = []
    for packed in (False, True):
        policy = tiny.build_policy(
            dtype=torch.float32, engine=engine, kernels="onednn", packed_weights=packed
        )
        copies = Counting(policy)
        completions, boundary = drawn(policy)
        assert bool(copies.made) == packed and not policy.free_packed(), "used, and freed at the end"
        numbers.append((completions, boundary))
    for a, b in zip(*(completions for completions, _ in numbers), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.logps, b.logps)
    if engine == "trie":
        assert torch.equal(*(boundary for _, boundary in numbers))


def test_sampling_differs_by_rounding_only():
    with_torch, _ = drawn(tiny.build_policy(dtype=torch.float32))
    with_onednn, _ = drawn(tiny.build_policy(dtype=torch.float32, kernels="onednn"))
    same = [(a, b) for a, b in zip(with_torch, with_onednn, strict=True) if list(a.ids) == list(b.ids)]
    assert len(same) > 10, "rounding moves few tokens"
    for a, b in same:
        np.testing.assert_allclose(b.logps, a.logps, rtol=0, atol=1e-5)


def test_out_of_memory_while_sampling_gives_up_the_packed_weights_first():
    policy = tiny.build_policy(dtype=torch.float32, kernels="onednn", packed_weights=True)
    of = policy.packed.of

    def short(weight):
        of(weight)
        raise torch.OutOfMemoryError("no room for a copy")

    policy.packed.of = short
    result = sample(policy, requests_of(), SamplingParams([tiny.END], texts_of, max_completion_length=12))
    assert policy.packed is None
    assert result.wave_size == SamplingParams.wave_size, "the wave was not the trouble"


# ---- choosing


def test_auto_takes_onednn_from_13_tenths_on(monkeypatch):
    for ratio, chosen in ((1.29, "torch"), (1.3, "onednn")):
        monkeypatch.setattr(kernels, "measure", lambda matrices, r=ratio: Speeds(100.0, 100.0 * r))
        assert choose_kernels("auto", "cpu", "float32", MATRICES).kernels == chosen


def test_what_onednn_does_not_serve_is_not_measured(monkeypatch):
    def never(matrices):
        raise AssertionError("measured")

    monkeypatch.setattr(kernels, "measure", never)
    assert choose_kernels("auto", "cuda", "float32", MATRICES).kernels == "torch"
    assert choose_kernels("auto", "cpu", "bfloat16", MATRICES) == Choice("torch", "the model is bfloat16")
    assert choose_kernels("auto", "cpu", "float32", [(128, 512)]).kernels == "torch"
    assert choose_kernels("torch", "cpu", "float32", MATRICES).kernels == "torch"
    assert choose_kernels("onednn", "cpu", "float32", MATRICES).kernels == "onednn"
    monkeypatch.setattr(kernels, "obstacle", lambda: "this build of torch has no oneDNN")
    assert choose_kernels("auto", "cpu", "float32", MATRICES).kernels == "torch"
    with pytest.raises(UserError, match=r"model\.kernels.*no oneDNN"):
        choose_kernels("onednn", "cpu", "float32", MATRICES)


def test_a_torch_without_the_operator_is_noticed(monkeypatch):
    def gone(*arguments):
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(kernels, "_product", gone)
    assert "lacks" in (kernels.obstacle.__wrapped__() or "")
    monkeypatch.setattr(kernels, "_product", lambda x, weight, bias: torch.zeros(len(x), len(weight)))
    assert kernels.obstacle.__wrapped__() == "its results differ"


def test_measuring_leaves_the_random_numbers_as_they_are():
    state = torch.get_rng_state()
    speeds = kernels.measure([(64, 96)])
    assert speeds.torch > 0 and speeds.onednn > 0
    assert speeds.ratio == pytest.approx(speeds.onednn / speeds.torch)
    assert torch.equal(torch.get_rng_state(), state)


# ---- after it


def test_a_model_is_what_it_was():
    model = tiny.build_model(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = tiny.with_random_b(
        get_peft_model(model.requires_grad_(False), LoraConfig(r=4, target_modules=["q_proj"]))
    )
    policy = Policy(adapted, kernels="onednn", packed_weights=True)
    groups = groups_of()
    drawn(policy)
    with policy.computing():
        engine_gradient(policy, groups, *credit_of(groups), Objective())
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
            torch.testing.assert_close(other(input_ids=ids).logits, expected)
        torch.save(adapted.state_dict(), io.BytesIO())
        merged = copy.deepcopy(adapted).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert copy.deepcopy(adapted).to(torch.bfloat16)(input_ids=ids).logits.dtype is torch.bfloat16
    restored = adapted.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.state_dict().items())


def _in_child(queue, x, weight):
    torch.set_num_threads(1)
    queue.put(linear(x, weight).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_computes_the_same():
    x, weight = random(5, 64), random(32, 64, seed=1)
    expected = linear(x, weight).numpy()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x, weight))
    child.start()
    actual = queue.get(timeout=120)
    child.join()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
