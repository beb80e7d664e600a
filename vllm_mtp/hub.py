"""Adapters and models by their name on the Hugging Face hub, `org/name` or `org/name@revision`, and where they lie on this machine.

What is there already is not asked for again where `HF_HUB_OFFLINE` says so; the cache is that of huggingface_hub, so `hf download`
fills it too. Pickled weights and code are never downloaded.
"""

import re
from pathlib import Path

from vllm_mtp.safe_files import AdapterError, read_json_object

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
CONFIG = "config.json"
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md")


def is_name(name: str | Path) -> bool:
    """Whether `name` can only be a repository's: it has the form of one, and there is no such file or folder."""
    try:
        return NAME.fullmatch(str(name)) is not None and not Path(str(name)).exists()
    except OSError:  # a name that is too long for a file
        return False


def local(name: str | Path) -> Path:
    """The folder of a repository's files, downloaded if need be; whatever is no repository's name stays as it is.

    Raises:
        AdapterError: it cannot be had.
    """
    return _download(str(name), FILES) if is_name(name) else Path(name)


def names_adapter(name: str) -> bool:
    """Whether a repository is an adapter of ours, by its config.json alone. Never raises: of what cannot be had, or is another
    project's, vLLM says more."""
    try:
        return read_json_object(_download(name, (CONFIG,)) / CONFIG).get("model_type") == "vllm_mtp"
    except AdapterError:
        return False


def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found = NAME.fullmatch(name)
    assert found is not None
    repository, revision = found["repository"], found["revision"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{name} is no folder here and cannot be had from the Hugging Face hub ({reason}): check the name, or download it "
            f"where there is a network (hf download {repository}) and name the folder."
        ) from None
