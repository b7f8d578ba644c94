"""Uploads a folder to the Hugging Face Hub, privately unless asked otherwise.

Whatever goes wrong there is one line. Knows nothing of what is in the folder; no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig import __version__
from twig.common.errors import UserError
from twig.common.progress import Progress

_LOGIN = "Run `hf auth login` with a token that may write"


@dataclass(frozen=True)
class Push:
    """Where a folder is uploaded to: the model repository `repo` (USER/NAME), private unless `public`."""

    repo: str
    public: bool = False


@dataclass(frozen=True)
class _Failure:
    """What went wrong on the Hub, and what to do about it."""

    problem: str
    fix: str = ""


def check_push(push: Push | None) -> None:
    """Raises UserError if an upload (None: none) cannot work; asks nobody."""
    if push is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError

    # In the documentation of the library, but not in the list of names that it exports.
    from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]

    try:
        validate_repo_id(push.repo)
    except HFValidationError as error:
        problem = f"{push.repo} is not a name on the Hub ({_without_queries(error)})"
        raise UserError("--push", problem, "Pass USER/NAME") from error
    if push.repo.count("/") != 1:
        raise UserError("--push", f"{push.repo} does not say whose it is", f"Pass USER/{push.repo}")
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE is set, so nothing can be uploaded"
        raise UserError("--push", problem, "Unset HF_HUB_OFFLINE, or leave out --push")
    if get_token() is None:
        raise UserError("--push", "this machine has no token for the Hub", _LOGIN)


def push_folder(folder: Path, push: Push, progress: Progress) -> str:
    """Uploads `folder`, creating the repository if there is none, and returns its address.

    A repository that is public already gets nothing unless `push.public`. Raises UserError; the folder stays.
    """
    from huggingface_hub import HfApi

    repo = push.repo
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    progress.phase("uploading")
    progress.message(f"uploading {size / 2**20:.1f} MiB to {repo}")
    api = HfApi(library_name="twig", library_version=__version__)
    try:
        url = str(api.create_repo(repo, private=not push.public, exist_ok=True))
        if push.public or api.model_info(repo).private:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Twig {__version__}")
            return url
    except Exception as error:  # the library and those below it raise dozens of kinds; each ends in this line
        failure = _failure(error)
        command = f"hf upload {repo} {folder}{'' if push.public else ' --private'}"
        first = f"{failure.fix}, then run" if failure.fix else "To try again, run"
        problem = f"{repo}: {failure.problem}; {folder} is written"
        raise UserError("--push", problem, f"{first} {command}") from error
    raise UserError(
        "--push",
        f"{repo} is public, so nothing was uploaded; {folder} is written",
        "Add --public, or pass another name",
    )


def _failure(error: Exception) -> _Failure:
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = _without_queries(getattr(error, "server_message", None) or error)
    kind = type(error).__name__
    if status == 401 or kind == "LocalTokenNotFoundError":
        return _Failure("the Hub does not accept the token", _LOGIN)
    if status == 403:
        return _Failure("the token may not write there", _LOGIN)
    if status is not None:
        return _Failure(f"the Hub answers {status} ({message})")
    if kind == "OfflineModeIsEnabled":
        return _Failure("HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE")
    return _Failure(f"the Hub is not reachable ({kind}: {message})")


def _without_queries(error: Any) -> str:
    # What the Hub or a library says may hold line ends and addresses with keys in them.
    return re.sub(r"\?\S*", "", " ".join(str(error).split()))[:160]
