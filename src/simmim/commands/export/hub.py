"""The Hugging Face Hub, where an export can go."""

from collections.abc import Sequence
from pathlib import Path


def check_repo(repo: str) -> None:
    """Refuse what is no USER/NAME before anything is written."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {repo}: {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"--push_to_hub {repo} is no repository: give it as USER/NAME")


def push(folder: Path, names: Sequence[str], repo: str, private: bool) -> str:
    """Upload files of a folder.

    Args:
        folder: The folder; it stays.
        names: The files.
        repo: USER/NAME; it is made if there is none.
        private: Whether only its owner may see it.

    Returns:
        Where it is.

    Raises:
        ValueError: If it cannot be pushed, or a private one is public already.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="simmim")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        is_public = private and not api.repo_info(url.repo_id).private
        if not is_public:
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                allow_patterns=list(names),
                commit_message="Export by simmim",
            )
    except Exception as error:  # whatever a network, a missing login or the Hub can do
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{folder} is written, but could not be pushed to {repo}: {said}. Log in with `hf auth "
            f"login`, then `hf upload {repo} {folder}`"
        ) from error
    if is_public:
        raise ValueError(
            f"{folder} is written, but not pushed: {repo} exists already and is public. Make it "
            "private first, choose another name, or leave --private out"
        )
    return str(url)
