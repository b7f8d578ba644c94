"""Reads the rows of a task: from Python, from JSON, JSONL or Parquet files, or from the Hugging Face Hub.

A row is a dict of columns. A lone surrogate, which no tokenizer and no UTF-8 file can hold, becomes the
escape that JSON writes for it. Knows nothing about the meaning of columns. Imports `datasets` and `pyarrow`
only when they are needed.
"""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache, refusal
from twig.common.text import message_of, storable
from twig.common.user_code import is_ours, message_from

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str, Callable[[], list[Row]]]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_EVAL_SPLITS = ("test", "validation", "valid", "dev", "eval")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HELD_OUT = 500
_ONE_OBJECT = "Write {...} on each line"


class _Numbered(dict[str, Any]):
    """A row of data that is divided, with its number in all of it."""

    def __init__(self, row: Row, number: int) -> None:
        super().__init__(row)
        self.number = number


def row_name(row: Row, place: int) -> str:
    """Returns what a message calls a row: by its number in the data, which may differ from its place here."""
    return f"data row {row.number if isinstance(row, _Numbered) else place}"


@dataclass(frozen=True)
class Rows:
    """The rows to train on, and those to evaluate on."""

    train: list[Row]
    eval: list[Row]


def read_rows(
    source: Any,
    hub_name: str | None = None,
    hub_config: str | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> Rows:
    """Reads the rows of a task, cut to `task.train_size` and `task.eval_size`.

    They are the data passed in, else those of `task.path` (a file, a folder, or a name on the Hub), else
    those of `hub_name`; `source` are the settings of the group `task`. A split called `all` is every row. If
    the data has no split for evaluation, rows are held out of training: `task.eval_size`, or a fifth but at
    most 500, always the same ones. Data passed in is never divided, and read only as far as these sizes
    say: a stream, which has no length, needs them. Raises UserError for anything that cannot be read.
    """
    if train_dataset is not None or eval_dataset is not None:
        rows = Rows(
            _passed("train_dataset", train_dataset, "train_size", source.train_size),
            _passed("eval_dataset", eval_dataset, "eval_size", source.eval_size),
        )
    else:
        rows = _choose(_open(source, hub_name, hub_config), source)
    return Rows(rows.train[: source.train_size], rows.eval[: source.eval_size])


def require_columns(rows: Sequence[Row], columns: Sequence[str], fix: str, texts: Sequence[str] = ()) -> None:
    """Raises UserError for the first row without one of the columns, or if one of `texts` is not text."""
    for place, row in enumerate(rows):
        where = row_name(row, place)
        for column in columns:
            value = row.get(column)
            if value is None:
                instead = "null there" if column in row else ", ".join(row) or "none"
                raise UserError(where, f"no column {column!r} (it has {instead})", fix)
            if column in texts and not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(where, f"{column} is a {kind}, not text", fix)


# ---- where the rows are ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Data that was opened: its name for messages, and a function that reads each split."""

    name: str
    splits: Splits


def _open(source: Any, hub_name: str | None, hub_config: str | None) -> _Source:
    if source.path is None:
        if hub_name is None:
            raise UserError(
                "task.path",
                f"not set, but task {source.name} needs data",
                "Set task.path=FILE.jsonl, a folder, or the name of a data set on the Hub",
            )
        return _Source(hub_name, _hub(hub_name, source.subset or hub_config, source))
    path = Path(source.path).expanduser()
    try:
        if source.subset is not None and path.exists():
            problem = f"{path} is on this machine, where nothing has configurations"
            raise UserError(
                "task.subset", problem, "Leave task.subset out, or set task.path to one of its files"
            )
        if path.is_dir():
            return _Source(str(path), _folder(path))
        if path.exists():
            return _Source(str(path), _file(path))
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error)) from error
    looks_like_a_file = path.suffix in (*_SUFFIXES, ".csv", ".txt") or path.is_absolute()
    if looks_like_a_file or not _HUB_NAME.fullmatch(source.path):
        raise UserError(
            "task.path",
            f"{path} does not exist",
            "Set task.path to a JSON, JSONL or Parquet file, or to a folder of them",
        )
    return _Source(source.path, _hub(source.path, source.subset, source))


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        "task.path", f"{path} cannot be read ({reason})", "Set task.path to another file or folder"
    )


def _hub(name: str, config: str | None, source: Any) -> Splits:
    import datasets
    import datasets.config

    try:
        with hub_or_cache(), _as_offline_as_the_hub(datasets.config):
            data: Any = datasets.load_dataset(name, config, revision=source.revision)
    except Exception as error:  # the libraries raise dozens of kinds; each becomes one line
        raise _refused(name, source, error) from error
    return {split: data[split].to_list for split in data}


@contextmanager
def _as_offline_as_the_hub(config: Any) -> Iterator[None]:
    """Makes `datasets` use its cache if the Hub is not reachable: it reads that switch only once."""
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or constants.HF_HUB_OFFLINE
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _refused(name: str, source: Any, error: Exception) -> UserError:
    def refused(problem: str, fix: str) -> UserError:
        return UserError(f"task {source.name}", f"data set {name} {problem}", fix)

    copy, reason = "set task.path=FOLDER if you have a copy", message_of(error)
    if re.search("config name is missing|builderconfig", reason, re.IGNORECASE):
        return UserError(
            "task.subset", f"data set {name}: {reason}", "Set task.subset= one of its configurations"
        )
    match refusal(error):
        case "gated":
            page = f"https://huggingface.co/datasets/{name}"
            return refused("needs its licence accepted", f"Open {page}, then run `hf auth login`")
        case "revision":
            return refused(f"has no revision {source.revision}", "Set task.revision=BRANCH, tag or commit")
        case "missing":
            return refused("is not on the Hub, or private", f"Check the name, run `hf auth login`, or {copy}")
        case "offline":
            problem = "is not on this machine, and the Hub is not reachable"
            return refused(problem, f"Check the network, or {copy}")
    return refused(
        f"cannot be read from the Hub ({type(error).__name__}: {reason})",
        "Set task.path=FOLDER if you have a copy",
    )


def _folder(path: Path) -> Splits:
    # Copies of Hub repositories keep their files in `data/` or `main/`.
    for folder in (path, path / "data", path / "main"):
        files = [file for file in sorted(folder.glob("*")) if file.suffix in _SUFFIXES and file.is_file()]
        if files:
            break
    else:
        raise UserError(
            "task.path",
            f"{path} holds no {', '.join(_SUFFIXES)} file",
            "Set task.path to a folder with train.jsonl",
        )
    shards: dict[str, list[Path]] = {}
    for suffix in _SUFFIXES:  # a split that exists in two formats is read once
        of_suffix: dict[str, list[Path]] = {}
        for file in files:
            if file.suffix == suffix:
                of_suffix.setdefault(_SHARD.sub("", file.stem), []).append(file)
        shards = {**of_suffix, **shards}
    return {
        split: lambda parts=parts: [row for part in parts for row in _rows(part)]
        for split, parts in shards.items()
    }


def _file(path: Path) -> Splits:
    if path.suffix == ".json":
        content = _json(path)
        if isinstance(content, dict) and content and all(isinstance(part, list) for part in content.values()):
            return {split: lambda rows=rows: _checked(rows, str(path)) for split, rows in content.items()}
    return {path.stem: lambda: _rows(path)}


# ---- files -------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".jsonl":
            return _json_lines(path)
        if path.suffix == ".json":
            return _checked(_json(path), str(path))
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error)) from error
    raise UserError(
        "task.path", f"{path} is none of {', '.join(_SUFFIXES)}", "Set task.path to a file of those"
    )


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise UserError(
            "task.path", f"{path} is not readable as Parquet ({error})", "Write the file again"
        ) from error


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return _whole(json.loads(text))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object per line under the other suffix
            return _json_lines(path)
        raise UserError(
            "task.path", f"{path} is not readable as JSON ({error})", "Correct the file"
        ) from error


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _whole(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                "task.path", f"{path} line {number} is not readable as JSON ({error})", _ONE_OBJECT
            ) from error
        if not isinstance(row, dict):
            raise UserError("task.path", f"{path} line {number} is not an object", _ONE_OBJECT)
        rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("task.path", f"{path} is not text in UTF-8", "Save the file as UTF-8") from error


def _whole(value: Any) -> Any:
    """Returns the value with each lone surrogate in its texts escaped."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def _checked(rows: Any, where: str) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            "task.path",
            f"{where} is not a list of objects",
            "Write [{...}, {...}], or an object with such a list for each split",
        )
    return rows


# ---- which rows --------------------------------------------------------------------------------------------


def _choose(source: _Source, settings: Any) -> Rows:
    splits = source.splits
    only = next(iter(splits)) if len(splits) == 1 and settings.eval_split is None else "train"
    train = _split(source, settings.train_split or only, "task.train_split")
    if not train:
        raise UserError(
            "task.path", f"{source.name} holds no rows to train on", "Set task.path to a file with rows"
        )
    others = (split for split in _EVAL_SPLITS if split in splits and split != only)
    name = settings.eval_split or next(others, None)
    if name is not None:
        return Rows(train, _split(source, name, "task.eval_split"))
    return _hold_out(train, settings.eval_size, source.name)


def _split(source: _Source, name: str, key: str) -> list[Row]:
    if name in source.splits:
        return source.splits[name]()
    if name == "all":
        return [row for read in source.splits.values() for row in read()]
    names = ", ".join(source.splits)
    raise UserError(key, f"{source.name} has no split {name!r}", f"Set {key} to one of {names}, or all")


def _hold_out(rows: list[Row], size: int | None, name: str) -> Rows:
    size = min(_HELD_OUT, len(rows) // 5) if size is None else size
    if size >= len(rows):
        raise UserError(
            "task.eval_size",
            f"{name} has {len(rows)} rows and no split for evaluation, so {size} cannot be held out",
            "Set a smaller task.eval_size",
        )
    held_out = set(random.Random(0).sample(range(len(rows)), size))
    logger.info("%s has no split for evaluation: %d of %d rows are held out for it", name, size, len(rows))
    numbered: list[Row] = [_Numbered(row, number) for number, row in enumerate(rows)]
    train = [row for number, row in enumerate(numbered) if number not in held_out]
    return Rows(train, [numbered[number] for number in sorted(held_out)])


def _passed(name: str, data: Any, size_name: str, size: int | None) -> list[Row]:
    if data is None:
        return []
    if isinstance(data, Mapping):
        names = ", ".join(map(str, data))
        raise UserError(name, f"holds the splits {names}", "Pass one split, a Dataset or a list of dicts")
    if isinstance(data, str):
        raise UserError(name, f"is the text {data!r}", "Pass a Dataset or a list of dicts")
    if size is None and not isinstance(data, Sized):
        problem = f"has no length, so there is no telling whether it ends ({type(data).__name__})"
        raise UserError(name, problem, f"Set task.{size_name}= the rows to read, or pass a list of dicts")
    rows = _first(name, data, size)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                name, f"row {number} is a {type(row).__name__}, not a dict", "Pass a dict per row"
            )
        odd = next((key for key in row if not isinstance(key, str)), None)
        if odd is not None:
            raise UserError(name, f"row {number} has a column {odd!r}", "Pass column names as text")
    if not rows:
        raise UserError(name, "holds no rows", "Pass at least one")
    try:
        return [_whole(dict(row)) for row in rows]
    except RecursionError:
        raise UserError(name, "a row holds itself, or is nested too deeply", "Pass flatter rows") from None


def _first(name: str, data: Any, size: int | None) -> list[Any]:
    """Returns the first `size` rows of data passed in (None: all); nothing beyond them is read."""
    rows: list[Any] = []
    try:
        rows.extend(islice(iter(data), size))
    except BaseException as error:  # of a generator of the user's, or of whatever a stream comes from
        if is_ours(error):
            raise
        problem = f"row {len(rows)} cannot be read ({type(error).__name__}: {message_from(error)})"
        raise UserError(name, problem, "Pass a Dataset or a list of dicts") from error
    return rows
