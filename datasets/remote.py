"""RLDS datasets elsewhere: gs://, s3://, https:// and whatever else fsspec opens.

    data=[gs://gresearch/robotics/fractal20220817_data/0.1.0?shards:8]

The shards, the first 8 here, are downloaded whole, once, into $XDG_CACHE_HOME/selfflow (~/.cache).
Not range by range: random windows would ask for a record of a megabyte each time and in every
epoch, and even to know how long the episodes are, every record must be looked into.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.datasets.rlds_index import SHARD, cache_home
from selfflow.datasets.spec import UserError

HELP = "gs:// needs pip install 'selfflow[gs]', others what fsspec says"


def is_url(path: str) -> bool:
    """Whether this is no path of the local disk."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def fetch(url: str, split: str = "train", shards: int | None = None) -> Path:
    """The local folder of a dataset, with the first `shards` of the split, by default all.

    What is not there yet, or of another size, is downloaded; an interrupted download goes on with
    the file it was at. Raises UserError if there is no dataset, it cannot be reached, or the disk
    is too small.
    """
    import fsspec.implementations.local

    try:
        files, root = fsspec.core.url_to_fs(url)
        found = _listed(files, root, split, shards)
        if not found:
            raise UserError(f"data={url}: no features.json there with shards of {split} beside it")
        there = next(iter(found)).rpartition("/")[0]
        if isinstance(files, fsspec.implementations.local.LocalFileSystem):
            return Path(there)
        source = f"{url.partition('://')[0]}/{there.strip('/')}"
        folder = cache_home() / "remote" / re.sub(r"[^\w.-]+", "_", source)
        todo = {p: size for p, size in found.items() if not _there(_local(folder, p), size)}
        _check_space(url, folder, sum(todo.values()))
        _download(files, todo, folder)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(f"data={url}: cannot be fetched ({e}); {HELP}") from e
    return folder


def _listed(files: Any, root: str, split: str, count: int | None) -> dict[str, int]:
    """Sizes of the dataset's files by path, those of its description before the shards."""
    for below in ("", "/*", "/*/*"):
        folders = [path.rpartition("/")[0] for path in files.glob(f"{root}{below}/features.json")]
        if len(folders) > 1:
            raise UserError(f"{root}: several datasets; give one of {', '.join(folders)}")
        for folder in folders:
            here = [e for e in files.ls(folder, detail=True) if e["type"] == "file"]
            sizes = {entry["name"]: int(entry["size"]) for entry in here}
            shards = [path for path in sorted(sizes) if _is_shard(path, split)][:count]
            about = [path for path in sorted(sizes) if path.endswith(".json")]
            return {path: sizes[path] for path in about + shards} if shards else {}
    return {}


def _is_shard(path: str, split: str) -> bool:
    match = SHARD.fullmatch(path.rpartition("/")[2])
    return match is not None and match["split"] == split


def _local(folder: Path, path: str) -> Path:
    return folder / path.rpartition("/")[2]


def _there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _check_space(url: str, folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"data={url}: {size / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free at {folder}; "
            "take fewer (?shards:8), or set XDG_CACHE_HOME to a larger disk"
        )


def _download(files: Any, todo: Mapping[str, int], folder: Path) -> None:
    """File by file, each there when it is whole."""
    console = Console(stderr=True, quiet=not todo)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"downloading to {folder}", total=sum(todo.values()))
        for path, size in todo.items():
            local = _local(folder, path)
            draft = local.with_name(f".{local.name}.part")
            files.get_file(path, str(draft))
            if not _there(draft, size):
                raise OSError(f"{path}: {draft.stat().st_size} bytes arrived of {size}")
            os.replace(draft, local)
            progress.advance(bar, size)
