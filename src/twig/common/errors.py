"""What a person can fix, as an exception."""

from twig.common.text import one_line


class UserError(ValueError):
    """Something the person running Twig can fix: one line saying what, where and what to write instead.

    Whatever the words were made from, they are one line of printable text.

    >>> str(UserError("my\\x1b[31m.yaml: no\\nfile"))
    'my\\\\x1b[31m.yaml: no file'
    """

    def __init__(self, words: str) -> None:
        super().__init__(one_line(words))
