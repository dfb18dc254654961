"""Upload of an export to the hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from fuchsia_pl.cli.failures import one_line
from fuchsia_pl.policy.sources import check_hub_id
from fuchsia_pl.types import ConfigError


def check_upload(repository: str) -> None:
    """Checks what is needed for an upload, before anything is computed.

    Raises:
        ConfigError: The id is malformed, or there is no token.
    """
    check_hub_id("--push-to-hub", repository)
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token: log in with `hf auth login`, or set the variable HF_TOKEN")


def upload(folder: Path, repository: str, private: bool, name: str) -> str:
    """Makes a repository if it does not exist, and commits all files of a folder to it.

    Args:
        folder: The files.
        repository: Id on the hub; without an owner it is the user of the token.
        private: Whether a new repository is private. An existing one stays as it is.
        name: Name of the trained model, for the message of the commit.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: The hub refused, or could not be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"{name}, exported by Fuchsia-PL")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise ConfigError(
            f"the hub refused the upload to {repository!r} ({status}: {one_line(error)}): check the token's rights and the id. "
            f"The files are in {folder}"
        ) from error
    except Exception as error:  # the client raises the errors of its HTTP library, and ValueError for a refused card
        raise ConfigError(
            f"the upload to {repository!r} failed ({type(error).__name__}: {one_line(error)}): try again. "
            f"The files are in {folder}"
        ) from error
    return str(address)
