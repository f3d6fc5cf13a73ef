"""Datasets of the Hugging Face hub: `data=[hf://owner/name]` is downloaded once, into its cache.

What was interrupted goes on with the next call; without a network what is in the cache is used.
"""

import re
from pathlib import Path

from selfflow.datasets.spec import UserError

PREFIX = "hf://"


def download(path: str) -> Path:
    """The local folder of hf://owner/name. Raises UserError if it cannot be had."""
    name = path.removeprefix(PREFIX).removeprefix("datasets/").rstrip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"data={path}: give {PREFIX}owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UserError("data from the hub need: pip install 'selfflow[hub]'") from e
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as e:  # what all errors of huggingface_hub are
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"data={path}: cannot be downloaded ({reason})") from e
