"""What Twig uses of a Hugging Face tokenizer, as a type: importing transformers takes seconds."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as transformers makes it; chat templates are read by `tasks.prompts` alone."""

    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Returns the ids of a text or of several texts under `input_ids`, and more."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Returns the text of ids."""
        ...

    def batch_decode(self, sequences: Sequence[Any], **options: Any) -> list[str]:
        """Returns the texts of several lists of ids."""
        ...

    def save_pretrained(self, save_directory: Any) -> Any:
        """Writes the tokenizer's files into a folder."""
        ...
