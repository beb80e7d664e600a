"""YAML files of options, by their names."""

from pathlib import Path
from typing import Any


def read_options(file: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: it is not YAML, or holds none.
        OSError: it cannot be read.
    """
    import yaml

    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options: write `name: value` in each line.")
    return options
