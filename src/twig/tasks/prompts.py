"""How one of a task's problems becomes the text and the tokens that the model sees.

The tokenizer is an argument; knows nothing about models.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.text import storable
from twig.core.types import Example
from twig.tasks.base import Task

Messages = list[dict[str, Any]]
_MOST_COUNTED = 4000

# `{{` and `}}` are braces, `{name}` is a column, every other brace is itself: `\boxed{}` needs no escape.
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


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
