"""Rows for a task: from Python, from local JSON, JSONL or Parquet files, or from the Hugging Face Hub.

A row is a dict of columns. A lone surrogate, which no tokenizer and no file in UTF-8 can hold, becomes the
escape that JSON writes for it. Knows nothing about what the columns mean. `datasets` and `pyarrow` are
imported only where they are needed.
"""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.hub import hub_or_cache, refusal
from twig.common.text import storable

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str, Callable[[], list[Row]]]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_EVAL_SPLITS = ("test", "validation", "valid", "dev", "eval")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HELD_OUT = 500


def read_rows(
    wanted: Any,
    hub_name: str | None = None,
    hub_config: str | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those to evaluate on, cut to `task.train_size` and `task.eval_size`.

    They come from the data passed in, else from `task.path` (a file, a folder, or a name on the Hub), else
    from `hub_name`. A split called `all` is every row. Where the data has no split for evaluation, rows are
    held out of training: `task.eval_size`, or a fifth but at most 500, always the same. Data passed in is
    never divided. Raises UserError, one line, for anything that cannot be read.
    """
    if train_dataset is not None or eval_dataset is not None:
        train, evaluation = _passed("train_dataset", train_dataset), _passed("eval_dataset", eval_dataset)
    else:
        where, splits = _open(wanted, hub_name, hub_config)
        train, evaluation = _choose(splits, wanted, where)
    return train[: wanted.train_size], evaluation[: wanted.eval_size]


def require_columns(
    rows: Sequence[Row], columns: Sequence[str], hint: str, texts: Sequence[str] = ()
) -> None:
    """Raises UserError for the first row that lacks one of the columns, or where one of `texts` is no text,
    with what was found and what to write."""
    for number, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            if value is None:
                found = "null there" if column in row else ", ".join(row) or "none"
                raise UserError(f"data row {number} has no column {column!r} (it has {found}); {hint}")
            if column in texts and not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(f"data row {number}: {column} is not text but a {kind}; {hint}")


# ---- where the rows are ------------------------------------------------------------------------------------


def _open(wanted: Any, hub_name: str | None, hub_config: str | None) -> tuple[str, Splits]:
    if wanted.path is None:
        if hub_name is None:
            raise UserError(
                f"task.path: not set; task {wanted.name} needs data: write task.path=FILE.jsonl, a folder, "
                "or the name of a data set on the Hub"
            )
        return hub_name, _hub(hub_name, hub_config, wanted)
    path = Path(wanted.path).expanduser()
    try:
        if path.is_dir():
            return str(path), _folder(path)
        if path.exists():
            return str(path), _file(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"task.path: {path} cannot be read ({reason}); write another") from error
    looks_like_a_file = path.suffix in (*_SUFFIXES, ".csv", ".txt") or path.is_absolute()
    if looks_like_a_file or not _HUB_NAME.fullmatch(wanted.path):
        raise UserError(
            f"task.path: {path} does not exist; write the path of a JSON, JSONL or Parquet file or folder"
        )
    return wanted.path, _hub(wanted.path, None, wanted)


def _hub(name: str, config: str | None, wanted: Any) -> Splits:
    import datasets

    try:
        with hub_or_cache(), _as_offline_as_the_hub(datasets.config):
            data = datasets.load_dataset(name, config, revision=wanted.revision)
    except Exception as error:  # the libraries raise dozens of kinds; each ends in one line
        raise UserError(f"task {wanted.name}: {_refused(name, wanted, error)}") from error
    return {split: data[split].to_list for split in data}


@contextmanager
def _as_offline_as_the_hub(config: Any) -> Iterator[None]:
    """Inside, `datasets` looks into its cache where the Hub cannot be reached: it reads the switch once."""
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or constants.HF_HUB_OFFLINE
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _refused(name: str, wanted: Any, error: Exception) -> str:
    copy = "with a copy on disk write task.path=FOLDER"
    why = refusal(error)
    if why == "gated":
        page = f"https://huggingface.co/datasets/{name}"
        return f"data set {name} needs its licence accepted: open {page}, then `hf auth login`"
    if why == "revision":
        return f"data set {name} has no revision {wanted.revision}; write task.revision=BRANCH, tag or commit"
    if why == "missing":
        return f"data set {name} is not on the Hub, or private; check the name, `hf auth login`, or {copy}"
    if why == "offline":
        return f"data set {name} is not on this machine and the Hub is not reachable; {copy}"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"data set {name} cannot be read from the Hub ({reason}); {copy}"


def _folder(path: Path) -> Splits:
    # `data/` and `main/` are where copies of Hub repositories keep their files.
    for folder in (path, path / "data", path / "main"):
        files = [file for file in sorted(folder.glob("*")) if file.suffix in _SUFFIXES and file.is_file()]
        if files:
            break
    else:
        raise UserError(
            f"task.path: {path} holds no {', '.join(_SUFFIXES)} file; write a folder with train.jsonl"
        )
    shards: dict[str, list[Path]] = {}
    for suffix in _SUFFIXES:  # a split that is there in two formats is read once
        found: dict[str, list[Path]] = {}
        for file in files:
            if file.suffix == suffix:
                found.setdefault(_SHARD.sub("", file.stem), []).append(file)
        shards = {**found, **shards}
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
        reason = error.strerror or error
        raise UserError(f"task.path: {path} cannot be read ({reason}); write another") from error
    raise UserError(f"task.path: {path} is none of {', '.join(_SUFFIXES)}; write one of those")


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise UserError(f"task.path: {path} is not readable as Parquet ({error}); write it anew") from error


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return _whole(json.loads(text))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # one object per line under the other suffix
            return _json_lines(path)
        raise UserError(f"task.path: {path} is not readable as JSON: {error}; correct it") from error


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _whole(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"task.path: {path} line {number} is not readable as JSON: {error}; write {{...}} on each "
                "line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"task.path: {path} line {number} is not an object; write {{...}} on each line")
        rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"task.path: {path} is not text in UTF-8; save it as UTF-8") from error


def _whole(value: Any) -> Any:
    """The value with each lone surrogate in its texts written out."""
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
            f"task.path: {where} is not a list of objects; write [{{...}}, {{...}}], or splits of those"
        )
    return rows


# ---- which rows --------------------------------------------------------------------------------------------


def _choose(splits: Splits, wanted: Any, where: str) -> tuple[list[Row], list[Row]]:
    only = next(iter(splits)) if len(splits) == 1 and wanted.eval_split is None else "train"
    train = _split(splits, wanted.train_split or only, "task.train_split", where)
    if not train:
        raise UserError(f"task.path: {where} holds no rows to train on; write a file with at least one")
    name = wanted.eval_split or next(
        (split for split in _EVAL_SPLITS if split in splits and split != only), None
    )
    if name is not None:
        return train, _split(splits, name, "task.eval_split", where)
    return _hold_out(train, wanted.eval_size, where)


def _split(splits: Splits, name: str, key: str, where: str) -> list[Row]:
    if name in splits:
        return splits[name]()
    if name == "all":
        return [row for read in splits.values() for row in read()]
    raise UserError(f"{key}: {where} has no split {name!r}; write one of {', '.join(splits)}, or all")


def _hold_out(rows: list[Row], size: int | None, where: str) -> tuple[list[Row], list[Row]]:
    size = min(_HELD_OUT, len(rows) // 5) if size is None else size
    if size >= len(rows):
        raise UserError(
            f"task.eval_size: {where} has {len(rows)} rows and no split for evaluation, so {size} cannot be "
            "held out of training; write a smaller number"
        )
    held = set(random.Random(0).sample(range(len(rows)), size))
    logger.info("%s has no split for evaluation: %d of %d rows are held out for it", where, size, len(rows))
    return [row for n, row in enumerate(rows) if n not in held], [rows[n] for n in sorted(held)]


def _passed(name: str, data: Any) -> list[Row]:
    if data is None:
        return []
    if isinstance(data, (Mapping, str)):
        what = (
            f"holds the splits {', '.join(map(str, data))}" if isinstance(data, Mapping) else f"is {data!r}"
        )
        raise UserError(f"{name}: {what}; pass one split, a Dataset or a list of dicts")
    rows = list(data)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}: row {number} is not a dict but {type(row).__name__}; pass a dict per row"
            )
        odd = next((key for key in row if not isinstance(key, str)), None)
        if odd is not None:
            raise UserError(f"{name}: row {number} has a column {odd!r}; pass names of columns as text")
    if not rows:
        raise UserError(f"{name}: holds no rows; pass at least one")
    return [_whole(dict(row)) for row in rows]
