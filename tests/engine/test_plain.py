"""What the plain engine runs, and what it does not. That it is exact is tested with the families."""

import numerics
import pytest
import tiny
import torch
from family_cases import FAMILIES
from gradients import credit_of, engine_gradient, groups_of, requests_of, texts_of

from twig.core.algorithms.base import Objective
from twig.engine.lora import attach
from twig.engine.plain_policy import PlainPolicy, Reading
from twig.engine.sampler import SamplingParams, sample


def policy_of(name):
    family = FAMILIES[name]
    model = attach(family.build(torch.float32), r=2, alpha=4.0, target_modules=family.modules, layers=[3])
    return PlainPolicy(tiny.with_random_b(model))


def inputs_of(module, monkeypatch):
    """The shapes of what `module` is called with from here on."""
    shapes, own = [], module.forward

    def forward(given, *args, **options):
        shapes.append(tuple(given.shape))
        return own(given, *args, **options)

    monkeypatch.setattr(module, "forward", forward)
    return shapes


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_an_update_never_computes_all_logits_of_a_text(family, monkeypatch):
    policy = tiny.build_policy(family, "eager", engine="plain")
    assert policy.one_pass
    groups = groups_of(7, count=2)
    tries, credits = credit_of(groups)
    calls = inputs_of(policy.model.get_output_embeddings(), monkeypatch)
    engine_gradient(policy, groups, tries, credits, Objective(), size=40)
    assert not calls, "the head's own forward has every row"


def test_each_prompt_is_run_once_and_equal_completions_are_one_row(monkeypatch):
    policy = policy_of("gpt2")
    assert policy.reading == Reading()
    calls = inputs_of(policy.model.get_input_embeddings(), monkeypatch)
    requests = requests_of(num=5, limits=(4, 4, 4))
    sample(policy, requests, SamplingParams([], texts_of, greedy=True))
    longest = max(len(request.prompt_ids) for request in requests)
    assert calls == [(3, longest), *[(3, 1)] * 3], "greedy completions of a prompt are all equal"


def test_prompts_of_one_length_are_read_together_if_the_longest_row_changes_the_others():
    policy = policy_of("llama with dynamic rope")
    assert not policy.reading.pads
    assert policy.batches([3, 4, 3]) == [[0, 2], [1]]
    assert policy_of("gpt2").batches([3, 4, 3]) == [[0, 1, 2]]


def test_a_model_that_ignores_the_mask_of_padding_gets_no_padding(monkeypatch):
    model = attach(tiny.build_model(), r=2, alpha=4.0, target_modules=["q_proj"])
    own = model.get_base_model().forward

    def unmasked(input_ids, attention_mask=None, **options):
        return own(input_ids=input_ids, **options)

    monkeypatch.setattr(model.get_base_model(), "forward", unmasked)
    policy = PlainPolicy(tiny.with_random_b(model))
    assert policy.reading.cache and not policy.reading.pads
    with numerics.casts():
        drawn = sample(policy, requests_of(num=2), SamplingParams([5, 6], texts_of, seed=3))
    assert all(len(each) == 2 for each in drawn.completions)
