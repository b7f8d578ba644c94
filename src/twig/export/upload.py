"""Uploads a folder to the Hugging Face Hub, privately unless asked otherwise.

Whatever goes wrong there is one line. Knows nothing of what is in the folder; no torch.
"""

import re
from pathlib import Path
from typing import Any

from twig import __version__
from twig.common.errors import UserError
from twig.common.progress import Progress

_LOGIN = "write `hf auth login` with a token that may write"


def check_push(repo: str | None, public: bool) -> None:
    """Raises UserError where a push to `repo` (None: no push) cannot work; asks nobody."""
    if repo is None:
        if public:
            raise UserError("--public: nothing is pushed; add --push USER/NAME")
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push: {repo} is not a name on the Hub ({_without_queries(error)}); write USER/NAME"
        ) from error
    if repo.count("/") != 1:
        raise UserError(f"--push: {repo} does not say whose it is; write USER/{repo}")
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave --push out"
        )
    if get_token() is None:
        raise UserError(f"--push: no token for the Hub is on this machine; {_LOGIN}")


def push_folder(folder: Path, repo: str, public: bool, progress: Progress) -> str:
    """Uploads `folder` to the model repository `repo`, made where there is none; returns its address.

    A repository that is public already gets nothing unless `public`. Raises UserError, one line; the folder
    stays.
    """
    from huggingface_hub import HfApi

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    progress.phase("uploading")
    progress.message(f"uploading {size / 2**20:.1f} MiB to {repo}")
    api = HfApi(library_name="twig", library_version=__version__)
    try:
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        if public or api.model_info(repo).private:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Twig {__version__}")
            return url
    except Exception as error:  # the library and those below it raise dozens of kinds; each ends in this line
        visibility = "" if public else " --private"
        raise UserError(
            f"--push: {repo}: {_reason(error)}; {folder} is written and can be uploaded with: "
            f"hf upload {repo} {folder}{visibility}"
        ) from error
    raise UserError(
        f"--push: {repo} is there already and public, so nothing was uploaded ({folder} is written); add "
        "--public, or write another name"
    )


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = _without_queries(getattr(error, "server_message", None) or error)
    kind = type(error).__name__
    if status == 401 or kind == "LocalTokenNotFoundError":
        return f"the Hub does not accept the token ({_LOGIN})"
    if status == 403:
        return f"the token may not write there ({_LOGIN}, or another name)"
    if status is not None:
        return f"the Hub answers {status} ({said})"
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set (unset it)"
    return f"the Hub is not reachable ({kind}: {said})"


def _without_queries(error: Any) -> str:
    # What the Hub or a library says may hold line ends and addresses with keys in them.
    return re.sub(r"\?\S*", "", " ".join(str(error).split()))[:160]
