"""What the tests of replay and of the trainer share."""

import tiny

from twig.core.types import Completion, Group
from twig.training.trainer import Trainer


def may_be_cut_to(done: Completion, tokens: list[int]) -> bool:
    """Whether `tokens` are a finished completion's first ones, at least one of them and not all."""
    return done.finished and 1 <= len(tokens) < len(done) and done.ids[: len(tokens)].tolist() == tokens


LONGEST, SIZE, PROMPTS = 12, 6, 3
ENDS = [tiny.END, 5, 6, 7]  # several end tokens, so that most completions finish and some do not


class Watched:
    """A reward that keeps what it was given: 1 for an even number of characters, else 0."""

    __name__ = "watched"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, completions, completion_ids, prompts, **kwargs):
        self.calls.append({"texts": completions, "ids": completion_ids, "prompts": prompts})
        return [float(len(text) % 2 == 0) for text in completions]


def prefix_of(group: Group) -> list[int]:
    return group.prompt_ids[len(group.prompt_ids) - group.prefix_length :].tolist()


def own_prompt(trainer: Trainer, index: int) -> list[int]:
    return trainer.tokenizer(trainer.task.train[index].prompt)["input_ids"]


def ids_of(batch) -> list[list[list[int]]]:
    return [[c.ids.tolist() for c in group.completions] for group in batch.groups]
