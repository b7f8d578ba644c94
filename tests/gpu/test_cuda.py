"""What only a device can show: that nothing stays behind on the CPU, that both compute the same, and whole
runs there. Memory is in test_cuda_memory.py, the captured decode step in engine/test_decode_steps.py."""

import numerics
import numpy as np
import pytest
import tiny
import torch
from gradients import credit_of, engine_gradient, groups_of, oracle_gradient, requests_of, texts_of
from saved import build_tokenizer

import twig
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.core.algorithms.base import Objective
from twig.engine.inverse_cdf import invert
from twig.engine.sampler import SamplingParams, sample
from twig.runs import checkpoint
from twig.runs.reader import read_metrics
from twig.tasks.load import load_task
from twig.training.trainer import Trainer

pytestmark = pytest.mark.gpu


# ---- places ------------------------------------------------------------------------------------------------


def test_everything_is_on_the_device():
    policy, there = tiny.build_policy(layers=[2, 3], suppress_tokens=[4]), numerics.place().type
    model = policy.peft_model
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    named |= {"suppressed": policy.suppressed, "device": torch.empty(0, device=policy.device)}
    drawn = sample(policy, requests_of(), SamplingParams([5, 6, 7], texts_of))
    named["boundary"] = drawn.boundary
    groups = groups_of()
    tries, credits = credit_of(groups)
    engine_gradient(policy, groups, tries, credits, Objective())
    optimizer = torch.optim.AdamW(policy.parameters.values())
    optimizer.step()
    named |= {f"gradient of {name}": p.grad for name, p in policy.parameters.items()}
    for name, parameter in policy.parameters.items():
        moments = optimizer.state[parameter]
        named |= {f"{key} of {name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    assert len(named) > 80
    assert [name for name, tensor in named.items() if tensor.device.type != there] == []
    lora = {p.dtype for p in policy.parameters.values()}
    assert lora == {torch.float32} and policy.model.dtype == numerics.now().dtype


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "granite"])
def test_the_gradient_is_that_of_float64_on_the_cpu(family):
    policy = tiny.build_policy(family, layers=[1, 3])
    groups = groups_of()
    tries, credits = credit_of(groups, "s-grpo")
    loss, ours = engine_gradient(policy, groups, tries, credits, Objective(), 40)
    with numerics.use(numerics.EXACT, "cpu"), numerics.casts():
        exact = numerics.recast(policy, torch.float64, "cpu")
        theirs = oracle_gradient(exact, groups, tries, credits, Objective())
    numerics.assert_same((loss, {n: g.cpu().double() for n, g in ours.items()}), theirs)


# ---- tokens from numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("vocabulary", [23, 5003, 151_936])
def test_a_token_of_probability_0_is_never_drawn_in_float32(vocabulary, rows):
    """A device adds up in an order of its own, so that a running sum may rise by rounding where a token adds
    nothing. The numbers are those sums, where it would show."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, vocabulary, generator=draw)
    logits[torch.rand(3, vocabulary, generator=draw) < 0.7] = float("-inf")
    logits[:, vocabulary // 2 : vocabulary // 2 + vocabulary // 10] = float("-inf")
    logits[:, -(vocabulary // 10) :] = float("-inf")
    table = logits.softmax(-1).to(numerics.place())
    for row in table:
        exact = row.double().cumsum(0)
        near = torch.cat([exact.float(), row[None].expand(2, -1).cumsum(-1)[0], row[None].cumsum(-1)[0]])
        near = near[:: max(len(near) // 64, 1)]
        numbers = torch.cat([near, near.nextafter(near + 1), near.nextafter(near - 1)]).clamp(0, 1)
        for some in numbers.split(rows):
            tokens = invert(row.expand(len(some), -1), some)
            assert bool((row[tokens] > 0).all())
            below = torch.where(tokens > 0, exact[(tokens - 1).clamp(min=0)], 0.0)
            assert bool((below - 1e-5 <= some).all() and (some <= exact[tokens] + 1e-5).all())


# ---- whole runs --------------------------------------------------------------------------------------------

STEPS = 4


def settings_of(*words):
    """A small run of the embedded model, on the device."""
    if numerics.place().type == "there":
        pytest.skip("a whole run is planned for devices that exist")
    values = {
        "model": {"name": "tiny-arithmetic", "device": numerics.place().type},
        "task": {"name": "multiplication", "digits": [3, 2], "train_size": 40, "eval_size": 16},
        "lora": {"r": 8, "alpha": 16},
        "rollout": {"num_generations": 8, "prompts_per_step": 4, "max_completion_length": 48},
        "algorithm": {"name": "t-spmo"},
        "train": {"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 2},
        "log": {"completions_steps": 1},
    }
    dtype = str(numerics.now().dtype).removeprefix("torch.")
    return Settings.from_dict(values, [f"model.dtype={dtype}", *words])


def adapter_of(run):
    return {n: p.detach().cpu() for n, p in run.model.named_parameters() if p.requires_grad}


ALGORITHMS = {
    "t-spmo with replay": ["algorithm.replay.probability=0.7", "algorithm.l2=0.01"],
    "grpo twice on a batch": ["algorithm.name=grpo", "algorithm.num_iterations=2", "algorithm.beta=0.04"],
    "s-grpo": ["algorithm.name=s-grpo", "algorithm.alpha=2", "algorithm.p=0.5", "algorithm.k=5"],
}


@pytest.mark.parametrize("words", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_run_trains_and_measures(words, tmp_path):
    run = twig.train(settings_of(*words), output=tmp_path / "run")
    assert run.summary["status"] == "finished" and run.summary["steps"] == STEPS
    assert 0 <= run.summary["accuracy_after"]["value"] <= 1
    assert {p.device.type for p in run.model.parameters()} == {numerics.place().type}
    adapter = adapter_of(run)
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())
    moved = [name for name, tensor in adapter.items() if "lora_B" in name and bool(tensor.any())]
    assert len(moved) == sum("lora_B" in name for name in adapter) > 0, "B begins at 0"
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["optimizer/skipped"] == 0
        assert np.isfinite([row["loss"], row["grad_norm"], row["entropy"], row["reward"]]).all()
        if row["tokens/selected"]:  # else there was no update to compare with
            assert 0 <= row["sampling/logp_gap"] < numerics.now().value
        assert row["memory/peak_bytes"] > 0
    assert rows[0]["tokens/selected"] > 0 and rows[0]["grad_norm"] > 0


def test_a_resumed_run_ends_where_one_that_was_not_stopped_does(tmp_path):
    whole = twig.train(settings_of(), output=tmp_path / "whole")
    twig.train(settings_of(f"train.max_steps={STEPS // 2}"), output=tmp_path / "parts")
    parts = twig.train(settings_of(), output=tmp_path / "parts", resume=True)
    assert parts.summary["steps"] == STEPS
    ours, theirs = ([r for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("parts", "whole"))
    first = STEPS // 2  # the first step behind the checkpoint; later ones add rounding to rounding
    assert ours[first]["tokens/sampled"] == pytest.approx(theirs[first]["tokens/sampled"], rel=0.2)
    assert ours[first]["learning_rate"] == theirs[first]["learning_rate"]
    ends = adapter_of(parts), adapter_of(whole)
    # Adam moves each entry by about the learning rate a step, whichever way the rounding of a gradient near 0
    # points; without its moments, or from another adapter, it would be the whole way
    gap = sum(float((ends[0][n] - value).abs().mean()) for n, value in ends[1].items()) / len(ends[1])
    assert gap < 0.25 * STEPS * 1e-3


def test_a_checkpoint_has_what_the_device_holds(tmp_path):
    """The tensors of a saved state are those of the trainer on the device, and go back there."""
    with numerics.use(numerics.now(), "cpu"):  # the policy is the test's own
        settings = settings_of()
    policy = tiny.build_policy()
    task = load_task(settings, reward_funcs=lambda completions, **_: [float(len(c) % 2) for c in completions])
    tokenizer = build_tokenizer()
    known = (tokenizer, task, SamplingParams.of(settings, tokenizer, [tiny.END, 5, 6, 7]), Progress())
    trainer, again = Trainer(settings, policy, *known), Trainer(settings, tiny.build_policy(), *known)
    trainer.step(1)
    tensors, state = trainer.state()
    path = checkpoint.save(tmp_path, 1, tensors, state, None)
    again.restore(*checkpoint.load(path))
    for name, parameter in policy.parameters.items():
        other = again.policy.parameters[name]
        assert other.device == parameter.device and torch.equal(other, parameter)
        for key, value in trainer.optimizer.state[parameter].items():
            actual = again.optimizer.state[other][key]
            assert actual.device == value.device and torch.equal(actual, value), key
    trainer.step(2), again.step(2)
    for name, parameter in policy.parameters.items():
        torch.testing.assert_close(again.policy.parameters[name], parameter, rtol=0.05, atol=2e-3)
