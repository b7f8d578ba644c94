"""The captured decode step on a CUDA device against the plain loop there, with the same noise.

"The same tokens" in float32: each is the one that the probabilities of its own pass draw, so where two ways
first differ the draw lies within 1e-4 of a boundary between tokens.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from twig.core.rng import uniforms
from twig.engine import decode_graph
from twig.engine.sampler import Request, SamplingParams, sample

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
PRECISIONS = ["float32"]
FAMILIES = {name: "eager" for name in tiny.FAMILIES | tiny.MORE_FAMILIES}
FAMILIES |= {name: "sdpa" for name in FAMILIES if tiny.has_sdpa(name)}
SEED, STEP, BOUNDARY = 3, 2, 1e-4


def requests_of(num=6, lengths=(4, 9, 3), limits=(24, 30, 20)):
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(3, tiny.VOCAB, length), num, limit, slot)
        for slot, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def policy_of(family, dtype=torch.float32, **options):
    modules = ["qkv_proj"] if family.startswith("phi3") else ["q_proj", "v_proj"]
    policy = tiny.build_policy(
        family, FAMILIES[family], dtype=dtype, layers=[2, 3], target_modules=modules, **options
    )
    assert policy.device.type == "cuda"
    return policy


def drawn_by(policy, decode, requests, **options):
    policy.decode = decode
    return sample(
        policy,
        requests,
        SamplingParams([5, 6], decode=lambda rows: [""] * len(rows), seed=SEED, **options),
        step=STEP,
    )


def on_a_boundary(policy, request, number, ids, t):
    """Whether the draw of position `t` lies within BOUNDARY of where one token ends and the next begins."""
    text = torch.tensor([*request.prompt_ids, *ids[:t]], device=policy.device)[None]
    with torch.no_grad():
        logits = policy.sampled_logits(policy.model(input_ids=text, use_cache=False).logits[0, -1:])
    edges = torch.softmax(logits.double(), -1)[0].cumsum(0)
    draw = uniforms(SEED, STEP, request.slot, number, request.max_tokens)[t]
    return float((edges - draw).abs().min()) < BOUNDARY


def compare(policy, requests, ours, theirs, tolerance):
    """Checks each row up to where two ways part; returns how many rows never do."""
    whole = 0
    for request, actual, expected in zip(requests, ours.completions, theirs.completions, strict=True):
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            length = min(len(a), len(b))
            differs = np.flatnonzero(a.ids[:length] != b.ids[:length])
            same = int(differs[0]) if len(differs) else length
            np.testing.assert_allclose(a.logps[:same], b.logps[:same], atol=tolerance)
            np.testing.assert_allclose(a.entropies[:same], b.entropies[:same], atol=tolerance)
            cells = min(same, length - 1)
            torch.testing.assert_close(
                ours.boundary[a.cells[:cells]],
                theirs.boundary[b.cells[:cells]],
                rtol=tolerance,
                atol=tolerance,
            )
            if len(differs):
                assert on_a_boundary(policy, request, number, a.ids, same)
            else:
                assert (len(a), a.finished) == (len(b), b.finished)
                whole += 1
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_gives_the_tokens_of_the_plain_loop_in_float32(family):
    policy, requests = policy_of(family, temperature=1.3, suppress_tokens=[0, 4]), requests_of()
    ours = drawn_by(policy, "graph", requests)
    assert policy.decode_refusal is None and policy.decode == "graph"
    lengths = {len(c) for group in ours.completions for c in group}
    assert len(lengths) > 3, "rows must end at different steps"
    whole = compare(policy, requests, ours, drawn_by(policy, "plain", requests), 1e-4)
    assert whole >= 17, "of 18 rows nearly all have no draw on a boundary"


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "granite"])
def test_in_bfloat16_log_probs_stay_near_those_of_the_plain_loop(family):
    policy, requests = policy_of(family, torch.bfloat16), requests_of()
    ours, theirs = (drawn_by(policy, way, requests) for way in ("graph", "plain"))
    gaps = []
    for actual, expected in zip(ours.completions, theirs.completions, strict=True):
        for a, b in zip(actual, expected, strict=True):
            length = min(len(a), len(b))
            differs = np.flatnonzero(a.ids[:length] != b.ids[:length])
            same = int(differs[0]) if len(differs) else length
            gaps += np.abs(a.logps[:same] - b.logps[:same]).tolist()
    assert len(gaps) > 50
    # a rounding of bfloat16 is 2^-8 of a logit of up to about 10
    assert np.median(gaps) < 0.03 and max(gaps) < 0.3


@pytest.mark.parametrize("shared", [True, False])
def test_waves_and_steps_share_captures_and_follow_the_adapter(shared, monkeypatch):
    monkeypatch.setattr(decode_graph, "_SHARE_FROM", 0 if shared else 1e9)
    policy, requests = policy_of("qwen2"), requests_of()
    for _ in range(2):
        ours = drawn_by(policy, "graph", requests, wave_size=7)
        assert len(policy.decode_steps.steps) <= 2
        compare(policy, requests, ours, drawn_by(policy, "plain", requests), 1e-4)
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                parameter += 0.3 * ("lora_B" in name)


def test_nothing_waits_for_the_device_between_two_looks():
    policy, requests = policy_of("qwen2"), requests_of()
    drawn_by(policy, "graph", requests)
    (step,) = policy.decode_steps.steps.values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not notice every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
import numerics, test_decode_graph as own
with numerics.use(numerics.SINGLE, "cuda"):
    policy, requests = own.policy_of("qwen2"), own.requests_of()
    ours = own.drawn_by(policy, "compiled", requests)
    assert (policy.decode, policy.decode_refusal) == ("compiled", None), policy.decode_refusal
    whole = own.compare(policy, requests, ours, own.drawn_by(policy, "plain", requests), 1e-4)
assert whole >= 17
"""


def test_a_compiled_step_gives_the_tokens_of_the_plain_loop():
    # in a process without the run-time checks of types, which a compiler cannot look through
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(here)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
