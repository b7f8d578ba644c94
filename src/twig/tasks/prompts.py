"""Turns a task's problem into the text and the tokens that the model sees.

The tokenizer is an argument; knows nothing about models.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.text import message_of, storable
from twig.core.types import Example
from twig.tasks.base import Task

Messages = list[dict[str, Any]]
_MOST_COUNTED = 4000
# More than most tokenizers need for a token: a prompt of so many characters may be too long.
_CHARACTERS = 8

# `{{` and `}}` are braces, `{name}` is a column, every other brace is itself: `\boxed{}` needs no escape.
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def fill_template(template: str, fields: Mapping[str, Any]) -> str:
    """Replaces `{name}` in the template by fields; `{{` and `}}` are braces.

    >>> fill_template("{question} Write \\\\boxed{}.", {"question": "2+3?"})
    '2+3? Write \\\\boxed{}.'

    Raises UserError for a name that no field has.
    """

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in fields:
            columns = ", ".join(f"{{{field}}}" for field in fields)
            raise UserError(
                "task.prompt_template",
                f"{{{name}}} is not a column of the data",
                f"Use one of {columns}, or {{{{{name}}}}} to keep the braces",
            )
        return str(fields[name])

    return _FIELD.sub(put, template)


def names_in(template: str | None) -> list[str]:
    """Returns the names in braces in a template, each once.

    >>> names_in("{question} Write \\\\boxed{}, {{not}} {hint}.")
    ['question', 'hint']
    """
    names = (match[1] for match in _FIELD.finditer(template or ""))
    return list(dict.fromkeys(name for name in names if name is not None))


def render_prompt(task: Task, example: Example, tokenizer: Any) -> str:
    """Returns the text that the model sees for an example: template, system prompt, chat template.

    A prompt of chat messages always goes through the tokenizer's chat template; a text does if the tokenizer
    has one (`task.chat` auto), always or never. Messages that end with one of the assistant end where the
    model is to continue it. Raises UserError if the tokenizer lacks the template.
    """
    if _is_chat(task, example, tokenizer):
        return _render_chat(task, _messages(task, example), tokenizer)
    text = _plain_text(task, example)
    return text if task.system_prompt is None else f"{task.system_prompt}\n\n{text}"


def encode_prompt(task: Task, example: Example, tokenizer: Any) -> np.ndarray:
    """Returns the token ids of `render_prompt`'s text, int64 [T].

    A chat template writes its own special tokens. A plain text gets those that the tokenizer puts in front,
    but never two begin tokens, and no end token: the model is to continue it. Raises UserError for an empty
    prompt.
    """
    chat = _is_chat(task, example, tokenizer)
    # No tokenizer takes a lone surrogate, which a template of the settings may hold.
    text = storable(render_prompt(task, example, tokenizer))
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    if not chat and ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        del ids[-1]
    if not ids:
        raise UserError(
            f"task {task.name}", "a prompt is empty", "Remove the row, or write text in task.prompt_template"
        )
    return np.array(ids, np.int64)


def longest_prompt(
    task: Task, examples: Sequence[Example], tokenizer: Any, context: int | None = None
) -> int:
    """Counts the tokens of the longest prompt of `examples`; 0 if there is none.

    Of more than 4,000 problems only those with the most characters are counted: well under a second. Raises
    UserError for a prompt that is far too long for `context` (None: no limit).
    """

    def characters(example: Example) -> int:
        prompt = example.prompt
        return len(prompt) if isinstance(prompt, str) else sum(len(str(part)) for part in prompt)

    examples = sorted(examples, key=characters, reverse=True)[:_MOST_COUNTED]
    texts: dict[bool, list[str]] = {True: [], False: []}
    for example in examples:
        text = render_prompt(task, example, tokenizer)
        if context is not None:
            _refuse_far_too_long(task, text, tokenizer, context)
        texts[_is_chat(task, example, tokenizer)].append(text)
    counts = [
        len(ids)
        for chat, rendered in texts.items()
        if rendered
        for ids in tokenizer(rendered, add_special_tokens=not chat)["input_ids"]
    ]
    return max(counts, default=0)


def refuse_too_long(task: Task, prompt: int, context: int | None) -> None:
    """Raises UserError if a prompt of so many tokens leaves no room in a model's context (None: no limit)."""
    if context is not None and prompt >= context:
        raise _too_long(task, str(prompt), context)


def _refuse_far_too_long(task: Task, text: str, tokenizer: Any, context: int) -> None:
    """Raises UserError if the beginning of a prompt alone has twice the tokens of the context.

    So a prompt of any length is refused in the time that takes, without tokenizing the rest of it. The
    factor of two leaves room for how the end of the beginning is cut.
    """
    length = _CHARACTERS * context
    while length < len(text):
        if len(tokenizer(text[:length], add_special_tokens=False)["input_ids"]) >= 2 * context:
            raise _too_long(task, f"over {2 * context}", context)
        length *= 4


def _too_long(task: Task, tokens: str, context: int) -> UserError:
    return UserError(
        f"task {task.name}",
        f"a prompt has {tokens} tokens, and the model's context only {context}",
        "Leave such rows out, or choose a model with a longer context",
    )


def written_twice(task: Task, tokenizer: Any) -> str | None:
    """Returns a special token that the chat template writes around a prompt and that a prompt holds already.

    None if no prompt does, or if there is no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        around = _render_chat(task, [{"role": "user", "content": ""}], tokenizer)
    except UserError:
        return None  # a template that refuses this refuses the prompts too, or takes only its own kind
    special = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special |= {str(token) for token in added if getattr(token, "special", False)}
    markers = sorted(token for token in special if token and token in around)

    def texts() -> Iterator[str]:
        yield from (text for text in (task.system_prompt, task.prompt_template) if text is not None)
        for example in (*task.train, *task.eval):
            if not isinstance(example.prompt, str):
                yield from (text_of(message.get("content")) or "" for message in example.prompt)
            elif task.chat != "never":
                yield example.prompt

    return next((marker for text in texts() for marker in markers if marker in text), None)


def problem_text(example: Example) -> str:
    """Returns a problem without template and system prompt; of chat messages, the last one."""
    if isinstance(example.prompt, str):
        return example.prompt
    return text_of(example.prompt[-1].get("content")) or "" if example.prompt else ""


def text_of(content: Any) -> str | None:
    """Returns the text of a message's content: a text, or parts that are all text; None for any other.

    >>> text_of([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), text_of([{"type": "image"}])
    ('a b', None)
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    parts = [text for text in texts if isinstance(text, str)]
    return "".join(parts) if len(parts) == len(content) else None


def _is_chat(task: Task, example: Example, tokenizer: Any) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not isinstance(example.prompt, str):
        if not has_template:
            raise UserError(
                f"task {task.name}",
                "prompts are chat messages, but the tokenizer has no chat template",
                "Write the prompts as plain text, or use a model with a chat template",
            )
        return True
    if task.chat == "always" and not has_template:
        problem = "always, but the tokenizer has no chat template"
        raise UserError("task.chat", problem, "Set task.chat=auto, or never")
    return task.chat != "never" and has_template


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
        problem = "the prompts are chat messages, which take no template"
        raise UserError("task.prompt_template", problem, "Set task.prompt_template=null")
    else:
        # Templates for text alone cannot write parts.
        messages = [{**message, "content": _plain_content(message)} for message in example.prompt]
    # A system message in the data wins.
    if task.system_prompt is not None and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": task.system_prompt}, *messages]
    return messages


def _plain_content(message: Mapping[str, Any]) -> Any:
    content = message.get("content")
    text = text_of(content)
    return content if text is None else text


def _render_chat(task: Task, messages: Messages, tokenizer: Any) -> str:
    continues = bool(messages) and messages[-1].get("role") == "assistant"
    turn = {"continue_final_message": True} if continues else {}
    options = {"add_generation_prompt": not continues, **turn, **task.chat_template_kwargs}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates refuse roles and their order by raising errors of any kind
        if type(error).__module__.partition(".")[0] not in ("jinja2", "builtins"):
            raise
        roles = ", ".join(str(message.get("role")) for message in messages)
        reason = message_of(error)
        raise UserError(
            f"task {task.name}",
            f"the chat template refuses messages with the roles {roles} ({reason})",
            "Change the roles, leave task.system_prompt out, or set task.chat=never for plain text",
        ) from error
