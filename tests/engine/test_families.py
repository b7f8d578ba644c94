"""Each family is either served by the trie engine exactly as its own forward would, or refused by name and
trained by the plain engine. `docs/models.md` is made from the lists here and in `tiny.py`."""

from pathlib import Path

import family_scan
import numerics
import oracles
import pytest
import tiny
import torch
import transformers
from family_cases import FAMILIES, GPT, MODULES
from gradients import credit_of, engine_gradient, groups_of, oracle_gradient, requests_of, scored, texts_of
from numerics import assert_same, assert_values
from saved import build_tokenizer

from twig.cli.app import main
from twig.common.errors import UserError
from twig.core.algorithms.base import Objective
from twig.core.rng import uniforms
from twig.engine.decoder import Decoder
from twig.engine.lora import attach
from twig.engine.pack import build_packs
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy
from twig.engine.sampler import SamplingParams, sample
from twig.runs.reader import read_metrics, read_summary

# Split in four places, the adapters' modules and their layers by number.
CUTS = {"lowest": [0, 2], "second": [1], "third": [2, 3], "last": [3]}

SERVED = [
    pytest.param(
        family,
        attention,
        cut,
        marks=()
        if (family in tiny.MORE_FAMILIES and (attention, cut) == ("sdpa", "third"))
        or (family in tiny.HYBRIDS | tiny.SHARING and (attention, cut) == ("sdpa", "lowest"))
        else pytest.mark.slow,
    )
    for family in tiny.FAMILIES | tiny.MORE_FAMILIES | tiny.HYBRIDS | tiny.SHARING
    for attention in ("sdpa", "eager")
    if attention == "eager" or tiny.has_sdpa(family)
    for cut in CUTS
]
TYPES = {"llama with dynamic rope": "llama", "phi3 with longrope": "phi3"}
every_family = pytest.mark.parametrize("name", FAMILIES)


def plain_policy(name):
    """The plain engine on a tiny model of the family, its LoRA B matrices random."""
    family = FAMILIES[name]
    model = attach(family.build(), r=4, alpha=8.0, target_modules=family.modules, layers=[3])
    return PlainPolicy(tiny.with_random_b(model), temperature=0.8, suppress_tokens=[0, 20])


def test_the_page_of_models_is_current():
    import models_page  # reads the lists above

    written = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == models_page.page(), "run: python tests/models_page.py > docs/models.md"


def test_every_type_that_was_scanned_is_exact_refused_or_not_built():
    rows = family_scan.written()
    assert sum(not row.not_built for row in rows.values()) > 100
    assert not [row for row in rows.values() if row.is_wrong]
    if transformers.__version__.startswith(family_scan.VERSION):
        assert sorted(rows) == family_scan.types()


@pytest.mark.parametrize(
    "kind",
    ["doge", "gpt2"]
    + [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (
            "llama",
            "bamba",
            "bert",
            "gemma3n_text",
            "deepseek_v3",
            "exaone4",
            "glm_moe_dsa",
            "mixtral",
            "xlnet",
        )
    ],
)
def test_a_type_is_still_what_the_scan_says(kind):
    """`scripts/scan_families.py` scans all of them."""
    assert family_scan.scan(kind) == family_scan.written()[kind]


@pytest.mark.parametrize(("family", "attention", "cut"), SERVED)
def test_tree_mask_and_trunk_give_the_values_and_gradients_of_the_own_forward(family, attention, cut):
    with numerics.casts():
        modules = MODULES.get(family, ["q_proj", "v_proj"])
        policy = tiny.build_policy(
            family, attention, layers=CUTS[cut], target_modules=modules, temperature=0.8
        )
        assert policy.cut == CUTS[cut][0]
        groups = groups_of(count=2)
        tries, credits = credit_of(groups)
        exact = numerics.exact(policy)
        own, logps = oracles.path_loss(exact, groups, tries, credits)
        own.backward()
        theirs = float(own.detach()), {n: p.grad.clone() for n, p in exact.parameters.items()}
        assert_same(engine_gradient(policy, groups, tries, credits, Objective()), theirs)
        for pack in build_packs(scored(groups, tries, credits), 30):
            values = policy.logps(pack).tolist()
            for g, n, value in zip(pack.targets.group, pack.targets.node, values, strict=True):
                assert_values(value, float(logps[g][n]))


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(family, attention, marks=() if quick else pytest.mark.slow)
        for family in tiny.MORE_FAMILIES | tiny.HYBRIDS | tiny.SHARING
        for attention in ("sdpa", "eager")
        for quick in [attention == "sdpa" and family in ("qwen3_5", "gemma4")]
    ],
)
def test_its_cache_samples_as_a_loop_over_whole_texts(family, attention):
    with numerics.casts():
        modules = MODULES.get(family, ["q_proj", "v_proj"])
        policy = tiny.build_policy(family, attention, target_modules=modules, suppress_tokens=[0, 20])
        assert_sampled_as_a_loop(policy)


@every_family
def test_the_trie_engine_refuses_it_by_name(name):
    family = FAMILIES[name]
    model = attach(family.build(torch.float32), r=4, alpha=8.0, target_modules=family.modules, layers=[3])
    with pytest.raises(UserError) as caught:
        Policy(model)
    assert caught.value.key == "model.engine=trie" and "model.engine=plain" in caught.value.fix
    assert caught.value.problem.endswith(f"'{TYPES.get(name, name)}' cannot be served: {family.why}")


@every_family
def test_the_plain_engine_gives_the_gradient_of_a_forward_over_each_prefix(name):
    with numerics.casts():
        policy = plain_policy(name)
        groups = groups_of(2, count=2)
        tries, credits = credit_of(groups)
        assert_same(
            engine_gradient(policy, groups, tries, credits, Objective(), size=40),
            oracle_gradient(policy, groups, tries, credits, Objective()),
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("gpt2", "mamba") else pytest.mark.slow) for n in FAMILIES]
)
def test_the_plain_engine_samples_as_a_loop_over_whole_texts(name):
    """Each family's own cache, with rows that end at different times."""
    with numerics.casts():
        assert assert_sampled_as_a_loop(plain_policy(name)).boundary is None


def assert_sampled_as_a_loop(policy):
    """Returns what was sampled."""
    end_ids, lengths, requests = [5, 6, 7, 8], set(), requests_of(num=3)
    exact = numerics.exact(policy)
    drawn = sample(policy, requests, SamplingParams(end_ids, texts_of, seed=3), step=2)
    for request, completions in zip(requests, drawn.completions, strict=True):
        for c, completion in enumerate(completions):
            noise = uniforms(3, 2, request.slot, c, request.max_tokens)
            follow = numerics.follow(completion.ids, noise)
            ids, logps, entropies = oracles.sample_one(
                exact, request.prompt_ids, request.max_tokens, end_ids, noise, follow
            )
            assert completion.ids.tolist() == ids
            assert_values(completion.logps, logps)
            assert_values(completion.entropies, entropies)
            lengths.add(len(ids))
    assert len(lengths) > 2, "completions must end at different steps"
    return drawn


def test_a_layer_without_linear_modules_is_named():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=tiny.VOCAB, **GPT))
    with pytest.raises(UserError, match="^lora.target_modules: layer 2 .*'q_proj'.* c_attn, c_fc"):
        attach(model, r=4, alpha=8.0, target_modules=["q_proj"])
    model.transformer.h[3] = torch.nn.Identity()
    with pytest.raises(UserError, match="^lora.target_modules: layer 3 .*'c_attn'"):
        attach(model, r=4, alpha=8.0, target_modules=["c_attn"])


def test_modules_that_peft_refuses_are_one_line():
    model = FAMILIES["mamba"].build(torch.float32)
    with pytest.raises(UserError, match="^lora.target_modules: .*out_proj.* incompatible"):
        attach(model, r=4, alpha=8.0, target_modules=["out_proj"])


def test_a_layer_that_needs_more_than_it_is_given_is_refused():
    """Whatever a family's layers raise when called one by one, as those of Gemma 4 do."""
    decoder = Decoder(tiny.build_model("llama"))

    own = decoder.layers[1].forward

    def demanding(hidden, *args, **kwargs):
        if hidden.shape[1] == 12:  # the tree behind its stem; the model's own forward has rows of 10
            raise TypeError("forward() missing 1 required positional argument: 'per_layer_input'")
        return own(hidden, *args, **kwargs)

    decoder.layers[1].forward = demanding
    with pytest.raises(UserError, match=r"'llama' cannot be served: its layers .* \(TypeError: forward.*pl"):
        decoder.check()


@pytest.mark.parametrize("name", ["gpt_neox", "mamba"])
def test_a_whole_run_is_refused_and_with_the_plain_engine_it_trains(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer, family = build_tokenizer(), FAMILIES[name]
    changes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    family.build(torch.float32, **changes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n' * 10)
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) for text in completions]\n"
    )
    words = "train quickstart --output run model.name=model task.name=custom task.path=data.jsonl".split()
    words += "task.reward_file=rewards.py:digits train.max_steps=2 rollout.max_completion_length=6".split()
    words += f"rollout.prompts_per_step=2 lora.target_modules=[{','.join(family.modules)}]".split()
    capsys.readouterr()
    assert main([*words, "log.progress=quiet"]) == 2
    said = capsys.readouterr().err
    shown, line = said.splitlines()
    assert shown == f"running the Python file {tmp_path / 'rewards.py'}"
    assert f"'{name}' cannot be served" in line and "model.engine=plain" in line
    assert not (tmp_path / "run").exists()
    assert main([*words, "log.progress=quiet", "model.engine=plain"]) == 0
    assert read_summary(tmp_path / "run")["steps"] == 2
    rows = read_metrics(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert max(row["sampling/logp_gap"] for row in rows) < 1e-4, "sampled and trained distribution are one"
