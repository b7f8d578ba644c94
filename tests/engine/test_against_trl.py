"""Full-token GRPO has the gradient of TRL's `GRPOTrainer` on the same completions and rewards.

The real trainer runs its own `train()`: it looks completions and rewards up in tables, and all that
comes after (advantages, old and reference log-probs, loss, backward) is its own. A callback reads the
adapter's gradient just before the optimizer step.
"""

from dataclasses import dataclass, replace

import numerics
import numpy as np
import pytest
import tiny
import torch
from gradients import engine_gradient, scored

from twig.common.progress import Progress
from twig.config.from_trl import losses, translate
from twig.config.sizes import Sizes
from twig.core.algorithms.base import Algorithm, Objective
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign
from twig.core.trie import PrefixTrie
from twig.core.types import Group
from twig.engine.lora import attach
from twig.engine.pack import build_packs
from twig.engine.policy import Policy
from twig.engine.update import LogProbs, Passes

pytest.importorskip("trl", reason="TRL is in the dev extra")

# Some end with the end token, others are cut off; every id is a word of the tokenizer, named by its number.
COMPLETIONS = [
    [
        [5, 6, 7, 8, 9, tiny.END],
        [5, 6, 7, 8, 9, tiny.END],  # a duplicate, with another reward
        [5, 6, 7],  # a prefix of the two above
        [5, 6, 4, 10, 11, 12, 13, 14, tiny.END],
        [tiny.END],
        [5, 9, 9, 9],
    ],
    [  # equal rewards: no advantage, and a KL term all the same
        [5, 6, tiny.END],
        [7, 8, 9, 10, 11],
        [7, 8, 4, tiny.END],
        [12, tiny.END],
        [12, 13, 14, 15, 16, 17, tiny.END],
        [6],
    ],
    [
        [9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
        [9, 10, 4],
        [9, tiny.END],
        [8, 7, 6, 5, 4, tiny.END],
        [8, 7, 6, 6, tiny.END],
        [20, 21, 22, tiny.END],
    ],
]
REWARDS = [[1.0, 0.0, 0.0, 0.5, 0.0, 0.25], [1.0] * 6, [0.0, 0.0, 1.0, 0.3, 0.0, -0.5]]
PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15]]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
LONGEST = 10

# TRL 1.16 calls rollout_func, by which the completions come in, experimental.
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


@dataclass
class Update:
    """One optimizer step of TRL: the adapter before it and the gradient, by parameter name."""

    adapter: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]


def words(ids) -> str:
    return " ".join(f"w{token}" for token in ids)


def word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=f"w{tiny.END}", pad_token="w0", unk_token="w2"
    )


def random_adapter(policy: Policy, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Non-zero A and B for every adapted module: with B = 0 the gradient of A is 0 and hides faults."""
    draw = torch.Generator().manual_seed(3)
    return {n: scale * 0.3 * torch.randn(p.shape, generator=draw) for n, p in policy.parameters.items()}


def put(parameters, values) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def build_policy(temperature: float) -> Policy:
    model = tiny.build_model("qwen2", dtype=numerics.now().rerun)
    return Policy(attach(model, alpha=8.0, layers=[2, 3], **LORA), temperature=temperature)


def trl_updates(adapter, folder, steps=1, passed=False, **options) -> list[Update]:
    """Trains with the real GRPOTrainer for `steps` optimizer steps from `adapter`.

    The adapter is `passed` with the model, or put into a new one, which TRL does not take for a reference.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    size = len(COMPLETIONS[0])
    expected = {words(p): (c, r) for p, c, r in zip(PROMPTS, COMPLETIONS, REWARDS, strict=True)}

    def rollout(prompts, trainer):
        completions = [expected[prompt][0][i % size] for i, prompt in enumerate(prompts)]
        ids = [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def reward(prompts, completion_ids, **kwargs):
        assert completion_ids == [expected[prompt][0][i % size] for i, prompt in enumerate(prompts)]
        return [expected[prompt][1][i % size] for i, prompt in enumerate(prompts)]

    updates: list[Update] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
            adapter = {n: p.detach().clone() for n, p in mine.items()}
            updates.append(Update(adapter, {n: p.grad.clone() for n, p in mine.items()}))

    arguments = {
        "output_dir": str(folder),
        "loss_type": "grpo",
        "per_device_train_batch_size": size * len(PROMPTS),
        "num_generations": size,
        "max_completion_length": LONGEST,
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # the gradient itself, not clipped
        "activation_checkpointing": False,
        "use_cpu": numerics.place().type == "cpu",
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = tiny.build_model("qwen2", dtype=numerics.now().rerun)
    config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=8.0, layers_to_transform=[2, 3], **LORA)
    if passed:
        model = get_peft_model(model, config)
        put({n: p for n, p in model.named_parameters() if p.requires_grad}, adapter)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**arguments | options),
        train_dataset=Dataset.from_dict({"prompt": list(expected)}),
        processing_class=word_tokenizer(),
        peft_config=None if passed else config,
        rollout_func=rollout,
        callbacks=[Watch()],
    )
    put({n: p for n, p in trainer.model.named_parameters() if p.requires_grad}, adapter)
    trainer.train()
    assert len(updates) == steps
    return updates


def our_batch(beta: float = 0.0, scale_rewards: str = "group"):
    return batch_of(algorithm("grpo", beta=beta, scale_rewards=scale_rewards))


def batch_of(ours: Algorithm):
    groups: list[Group] = [
        tiny.make_group(*parts, i) for i, parts in enumerate(zip(PROMPTS, COMPLETIONS, REWARDS, strict=True))
    ]
    tries = [PrefixTrie.build([c.ids for c in g.completions], g.rewards) for g in groups]
    rngs = [np.random.default_rng(0) for _ in groups]
    credits, _ = assign(ours, tries, rngs, len(groups))
    return groups, tries, credits


def assert_same_gradient(ours, theirs) -> None:
    """Each matrix equal to 1e-4 of its own largest entry."""
    assert ours.keys() == theirs.keys() and len(theirs) == 2 * 2 * 2  # A and B of two modules in two layers
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-5, f"{name}: the comparison needs a gradient"
        assert float((ours[name] - gradient).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize(
    ("beta", "temperature", "options"),
    [
        (0.0, 1.0, {}),
        (0.04, 1.0, {}),
        (0.04, 1.0, {"use_bias_correction_kl": False}),
        (0.04, 0.7, {"scale_rewards": "none"}),
        (0.04, 1.0, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}),
    ],
    ids=["beta=0", "beta=0.04", "kl-without-ratio", "temperature-unscaled", "micro-batches"],
)
def test_gradient_equals_that_of_trl(tmp_path, beta, temperature, options):
    policy = build_policy(temperature)
    adapter = random_adapter(policy)
    (theirs,) = trl_updates(adapter, tmp_path, beta=beta, temperature=temperature, **options)
    put(policy.parameters, adapter)
    groups, tries, credits = our_batch(beta, options.get("scale_rewards", "group"))
    surrogate = Objective(beta=beta, bias_correction=options.get("use_bias_correction_kl", True))
    _, ours = engine_gradient(policy, groups, tries, credits, surrogate)
    assert_same_gradient(ours, theirs.gradient)


def test_the_reference_of_a_run_from_an_adapter_is_that_of_trl(tmp_path):
    """The second step of a run from a saved adapter, whose KL term refers to where the run began."""
    policy = build_policy(1.0)
    adapter = random_adapter(policy)
    begun, second = trl_updates(adapter, tmp_path, steps=2, passed=True, beta=0.04)
    put(policy.parameters, begun.adapter)
    policy.keep_reference()
    put(policy.parameters, second.adapter)
    groups, tries, credits = our_batch(0.04)
    passes = Passes(policy, Sizes(1, 30, 2**22, False), Progress(), scored(groups, tries, credits), None)
    with policy.reference():
        given = LogProbs(ref=passes.logps())
    for parameter in policy.parameters.values():
        parameter.grad = None
    passes.backward(Objective(beta=0.04), given)
    assert_same_gradient({n: p.grad for n, p in policy.parameters.items()}, second.gradient)


# TRL's options, of every loss that `translate` maps. At these bounds the clips bind in the second step.
RULES = {
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.04},
    "dr-grpo-scaled": {"loss_type": "dr_grpo", "epsilon": 0.1},
    "dapo": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.4},
    "bnpo": {"loss_type": "bnpo", "epsilon": 0.1, "beta": 0.04},
    "grpo": {"loss_type": "grpo", "scale_rewards": "batch", "epsilon": 0.1},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.1,
        "epsilon_high": 0.2,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
}


def mapped(options):
    """The algorithm that TRL's options become."""
    translation = translate(options)
    translation.check("test")
    return algorithm(**translation.settings["algorithm"]).resolved(LONGEST)


def test_every_loss_that_is_mapped_is_compared():
    default = {"importance_sampling_level": "token"}
    pairs = {(each["loss_type"], (default | each)["importance_sampling_level"]) for each in RULES.values()}
    assert pairs == set(losses())


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", RULES)
def test_gradients_of_other_losses_equal_those_of_trl(tmp_path, name, steps):
    """The first optimizer step on a batch, and the second, from TRL's own adapter after its first."""
    theirs = RULES[name]
    ours = mapped(theirs)
    policy = build_policy(1.0)
    updates = trl_updates(random_adapter(policy), tmp_path, steps=steps, num_iterations=steps, **theirs)
    groups, tries, credits = batch_of(ours)
    passes = Passes(policy, Sizes(1, 30, 2**22, False), Progress(), scored(groups, tries, credits), None)
    put(policy.parameters, updates[0].adapter)
    given = LogProbs()
    if steps == 2:
        given = LogProbs(old=passes.logps())
        put(policy.parameters, updates[1].adapter)
        given = replace(given, current=passes.logps())
    objective = ours.objective()
    if objective.beta:
        with policy.base():
            given = replace(given, ref=passes.logps())
    for parameter in policy.parameters.values():
        parameter.grad = None
    passes.backward(objective, given)
    assert_same_gradient({n: p.grad for n, p in policy.parameters.items()}, updates[-1].gradient)


def test_ratios_of_completions_are_clipped_at_both_bounds(tmp_path):
    """The sequence ratios of the second step above lie on both sides of both bounds."""
    policy = build_policy(1.0)
    first, second = trl_updates(random_adapter(policy), tmp_path, steps=2, num_iterations=2, **RULES["gspo"])
    groups, tries, credits = batch_of(mapped(RULES["gspo"]))
    passes = Passes(policy, Sizes(1, 4096, 2**22, False), Progress(), scored(groups, tries, credits), None)
    logps = []
    for update in (first, second):
        put(policy.parameters, update.adapter)
        logps.append(passes.logps())
    kinds = set()
    for index, (trie, credit) in enumerate(zip(tries, credits, strict=True)):
        old, new = (each.of_group(index) for each in logps)
        for path, tokens in zip(trie.paths, credit.tokens, strict=True):
            if tokens.any():
                ratio = float(np.exp((new[path] - old[path]).mean()))
                kinds.add((bool(tokens.sum() > 0), ratio > 1.2 if tokens.sum() > 0 else ratio < 0.9))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_gradient_of_a_second_iteration_with_clipping_equals_that_of_trl(tmp_path):
    """The second optimizer step on one batch, from TRL's own adapter after its first."""
    policy = build_policy(1.0)
    adapter = random_adapter(policy)
    clip = {"epsilon": 0.1, "epsilon_high": 0.4}
    first, second = trl_updates(adapter, tmp_path, steps=2, num_iterations=2, beta=0.04, **clip)
    groups, tries, credits = our_batch(0.04)
    (pack,) = build_packs(scored(groups, tries, credits), 4096)
    put(policy.parameters, first.adapter)
    old = policy.logps(pack)
    put(policy.parameters, second.adapter)
    with policy.base():
        ref = policy.logps(pack)
    for parameter in policy.parameters.values():
        parameter.grad = None
    logp, _ = policy.backward(pack, Objective(beta=0.04, **clip), None, old, ref)

    ratio = (logp - old).exp().cpu().numpy()
    plus, minus = pack.targets.plus > 0, pack.targets.minus < 0
    high, low = ratio[plus], ratio[minus]
    assert (high > 1.4).sum() > 1 and (low < 0.9).sum() > 1, "the clip must bind on both sides"
    assert ((high > 1.1) & (high < 1.4)).any() and ((low < 0.9) & (low > 0.6)).any(), "and at its own bound"
    assert (plus & minus).any(), "completions of both signs must share a node"
    assert_same_gradient({n: p.grad for n, p in policy.parameters.items()}, second.gradient)
