"""What a task is, and how one of its problems becomes the tokens that the model sees.

A task module holds one function, `load(settings) -> Task` (one that reads data: `load(settings,
train_dataset, eval_dataset)`), and is listed in `tasks/__init__.py`. Knows nothing about models, data files
or algorithms; the tokenizer is an argument.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twig.escape import storable
from twig.records import Example, Score, UserError
from twig.tasks.calls import Limit

Messages = list[dict[str, Any]]
_MOST_COUNTED = 4000

# `{{` and `}}` are braces, `{name}` is a column, every other brace is itself: `\boxed{}` needs no escape.
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class Task:
    """Problems to train on and to evaluate on, and how a completion is rewarded.

    `reward_funcs` have TRL's signature: by keyword `prompts`, `completions`, `completion_ids`, every column
    of the data as a list, and `trainer_state`, `log_extra`, `log_metric`; they return one number or None per
    completion. `reward_weights` has one weight per function (None: 1 each). `score` reads one completion's
    text; a task that cannot tell by itself has none, and then a completion is right when its weighted reward
    reaches `correct_at`. `score_lenient` reads the last number instead of the marked answer: it tells what a
    model knows from how it writes it down, and is only reported. `prompt_template` is filled with the
    example's columns, and `{question}` or `{prompt}` with its prompt where no column has that name; None
    leaves the prompt as it is. `reward_limit` is the time that one call of a reward function may take. `eval`
    may be empty.
    """

    name: str
    train: Sequence[Example]
    eval: Sequence[Example]
    reward_funcs: tuple[Callable[..., Any], ...]
    reward_weights: tuple[float, ...] | None = None
    score: Callable[[str, Example], Score] | None = None
    score_lenient: Callable[[str, Example], Score] | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    correct_at: float = 1.0
    reward_limit: Limit = Limit()


def fill_template(template: str, fields: Mapping[str, Any]) -> str:
    """The template with `{name}` replaced by fields; `{{` and `}}` are braces.

    >>> fill_template("{question} Write \\\\boxed{}.", {"question": "2+3?"})
    '2+3? Write \\\\boxed{}.'

    Raises UserError for a name that no field has.
    """

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in fields:
            raise UserError(
                f"task.prompt_template: {{{name}}} is not a column of the data; write one of "
                f"{', '.join('{' + field + '}' for field in fields)}, or {{{{{name}}}}} to keep the braces"
            )
        return str(fields[name])

    return _FIELD.sub(put, template)


def render_prompt(task: Task, example: Example, tokenizer: Any, task_settings: Any) -> str:
    """The text that the model sees for an example: template, system prompt, chat template.

    A prompt of chat messages always goes through the tokenizer's chat template; a text does where the
    tokenizer has one (`task.chat` auto) or always or never. Raises UserError where the tokenizer has no
    template to use.
    """
    if _is_chat(example, tokenizer, task_settings):
        return _render_chat(_messages(task, example), tokenizer, task_settings.chat_template_kwargs)
    text = _plain_text(task, example)
    return text if task.system_prompt is None else f"{task.system_prompt}\n\n{text}"


def encode_prompt(task: Task, example: Example, tokenizer: Any, task_settings: Any) -> np.ndarray:
    """The token ids of `render_prompt`'s text, int64 [T].

    A chat template writes its own special tokens. A plain text gets those that the tokenizer puts in front,
    never two begin tokens and no end token: the model is to go on from here. Raises UserError where nothing
    is left.
    """
    chat = _is_chat(example, tokenizer, task_settings)
    # No tokenizer takes a lone surrogate, which a template of the settings may hold.
    text = storable(render_prompt(task, example, tokenizer, task_settings))
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    if not chat and ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        del ids[-1]
    if not ids:
        raise UserError(
            f"task {task.name}: a prompt is empty; remove the row, or write text in task.prompt_template"
        )
    return np.array(ids, np.int64)


def longest_prompt(task: Task, examples: Sequence[Example], tokenizer: Any, task_settings: Any) -> int:
    """The number of tokens in the longest prompt of `examples`, 0 where there is none.

    Of more than 4,000 problems those with the most characters are counted, which takes well under a second.
    """

    def characters(example: Example) -> int:
        prompt = example.prompt
        return len(prompt) if isinstance(prompt, str) else sum(len(str(part)) for part in prompt)

    examples = sorted(examples, key=characters, reverse=True)[:_MOST_COUNTED]
    texts: dict[bool, list[str]] = {True: [], False: []}
    for example in examples:
        text = render_prompt(task, example, tokenizer, task_settings)
        texts[_is_chat(example, tokenizer, task_settings)].append(text)
    counts = [
        len(ids)
        for chat, rendered in texts.items()
        if rendered
        for ids in tokenizer(rendered, add_special_tokens=not chat)["input_ids"]
    ]
    return max(counts, default=0)


def refuse_too_long(task: Task, prompt: int, context: int | None) -> None:
    """Raises UserError where a prompt of so many tokens leaves no room in a model's context (None: it has no
    limit)."""
    if context is not None and prompt >= context:
        raise UserError(
            f"task {task.name}: a prompt has {prompt} tokens, and the model's context only {context}; leave "
            "out such rows, or choose a model with a longer context"
        )


def data_revision(task: Task) -> str:
    """A checksum of the problems in their order, wherever they came from."""
    digest = hashlib.sha256()
    for examples in (task.train, task.eval):
        for example in examples:
            row = [example.prompt, example.columns]
            text = json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"


def _is_chat(example: Example, tokenizer: Any, task_settings: Any) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not isinstance(example.prompt, str):
        if not has_template:
            raise UserError(
                "prompts are chat messages, but the tokenizer has no chat template; "
                "write the prompts as plain text, or use a model with one"
            )
        return True
    if task_settings.chat == "always" and not has_template:
        raise UserError("task.chat: always, but the tokenizer has no chat template; write auto or never")
    return task_settings.chat != "never" and has_template


def _plain_text(task: Task, example: Example) -> str:
    assert isinstance(example.prompt, str)
    if task.prompt_template is None:
        return example.prompt
    fields = {"question": example.prompt, "prompt": example.prompt, **example.columns}
    return fill_template(task.prompt_template, fields)


def _messages(task: Task, example: Example) -> Messages:
    if isinstance(example.prompt, str):
        messages = [{"role": "user", "content": _plain_text(task, example)}]
    elif task.prompt_template is not None:
        raise UserError("task.prompt_template: the prompts are chat messages, which take none; leave it out")
    else:
        messages = list(example.prompt)
    # A system message of the data's own stays.
    if task.system_prompt is not None and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": task.system_prompt}, *messages]
    return messages


def _render_chat(messages: Messages, tokenizer: Any, kwargs: Mapping[str, Any]) -> str:
    options = {"add_generation_prompt": True, **kwargs}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (
        Exception
    ) as error:  # whatever the template's own code raises: templates refuse roles and orders by raising
        if type(error).__module__.partition(".")[0] not in ("jinja2", "builtins"):
            raise
        roles = ", ".join(str(message.get("role")) for message in messages)
        reason = " ".join(str(error).split())
        raise UserError(
            f"the chat template refuses messages with the roles {roles}: {reason}; "
            "change the roles, leave task.system_prompt out, or write task.chat=never for plain text"
        ) from error
