"""Builds the policy that settings ask for: the trie engine, or the plain one.

Knows nothing of tasks or runs.
"""

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES, Sizes, with_sizes
from twig.engine.base_policy import BasePolicy
from twig.engine.load import suppressed_ids
from twig.engine.plain_policy import PlainPolicy
from twig.engine.policy import Policy

ENGINES: dict[str, type[BasePolicy]] = {kind.engine: kind for kind in (Policy, PlainPolicy)}


def build_policy(peft_model: PeftModel, settings: Settings) -> BasePolicy:
    """Returns the policy of `model.engine`; raises UserError if that engine does not serve the model."""
    sizes = Sizes.of(with_sizes(settings, DEFAULT_SIZES.by_key()))
    model = cast(PreTrainedModel, peft_model.get_base_model())
    vocabulary = cast(nn.Linear, model.get_output_embeddings()).weight.shape[0]
    return ENGINES[settings.model.engine](
        peft_model,
        temperature=settings.rollout.temperature,
        suppress_tokens=suppressed_ids(model, settings.rollout.suppress_tokens, vocabulary),
        head_chunk=sizes.head_chunk,
        checkpoint_layers=sizes.checkpoint_layers,
        decode=settings.rollout.decode,
        kernels=settings.model.kernels,
        packed_weights=sizes.packed_weights,
    )
