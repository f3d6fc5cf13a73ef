"""python datasets/text_table.py encoder=use data=[path/to/fractal] out=use.safetensors

Makes a table of instructions and their vectors, which `text=table` and `text=use` read without any
model (text.py). `encoder=minilm` computes those of RT-1's and all tasks' instructions
(instructions.py) and of `data`, if given; the table that ships was made by
`python datasets/text_table.py encoder=minilm out=datasets/instructions.safetensors`.
`encoder=use` copies the Universal Sentence Encoder's vectors that RLDS data hold.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from rich.console import Console
from rich.progress import track

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.episodes import EpisodeSource
from selfflow.datasets.instructions import instructions
from selfflow.datasets.rlds import RldsSource
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.text import (
    MiniLMEncoder,
    minilm_folder,
    normalised,
    save_table,
    save_vectors,
    unit_rms,
    unknown,
)

log = logging.getLogger(__name__)

SAME = 1e-3  # vectors of unit norm closer than this are one and the same


@dataclass(frozen=True)
class TextTableConfig:
    """Keys are explained in configs/text_table.yaml."""

    out: str = "instructions.safetensors"
    encoder: str = "minilm"
    data: list[str] = field(default_factory=list)
    path: str | None = None


def main(config: TextTableConfig) -> Path:
    """Makes the table; returns its path."""
    sources = open_sources(config.data)[0] if config.data else []
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if config.encoder == "use":
        texts, vectors = use_vectors([s for s in sources if isinstance(s, RldsSource)])
        save_vectors(out, "use512", texts, vectors)
    else:
        texts = sorted({*instructions(), *spoken(sources)} - {""})
        save_table(out, _minilm(config), texts)
    size = out.stat().st_size / 1e3
    Console().print(f"{out}: {len(texts)} instructions, {size:.0f} kB", soft_wrap=True)
    return out


def _minilm(config: TextTableConfig) -> MiniLMEncoder:
    """The model itself, without the table that ships."""
    return MiniLMEncoder(minilm_folder(Path(config.path).expanduser() if config.path else None))


def check(config: TextTableConfig) -> None:
    """Raises UserError before anything is written."""
    one_of("encoder", config.encoder, ("minilm", "use"))
    if Path(config.out).is_dir():
        raise UserError(f"out={config.out}: a folder; give a file, e.g. out=use.safetensors")
    sources = open_sources(config.data)[0] if config.data else []
    if config.encoder == "minilm":
        if complaint := unknown(_minilm(config), instructions()):
            raise UserError(complaint)
        return
    if not sources:
        raise UserError("encoder=use: needs data=[path/to/rlds], which holds the vectors")
    for source in sources:
        if not isinstance(source, RldsSource):
            raise UserError(f"encoder=use: {source.name} holds no USE vectors; give RLDS data")


def spoken(sources: Iterable[EpisodeSource]) -> set[str]:
    """All instructions of these sources, normalised."""
    return {
        normalised(text)
        for source in sources
        for i in track(range(len(source)), source.name, transient=True)
        for text in set(source.signals(i).instruction)
    }


def use_vectors(
    sources: Iterable[RldsSource],
) -> tuple[list[str], Float32[np.ndarray, "N 512"]]:
    """Each instruction once, with its first vector, at unit root mean square.

    Warns of those that have another vector elsewhere.
    """
    found: dict[str, np.ndarray] = {}
    differing: set[str] = set()
    for source in sources:
        for i in track(range(len(source)), source.name, transient=True):
            for raw, vector in source.text_embeddings(i).items():
                text = normalised(raw)
                if np.abs(found.setdefault(text, vector) - vector).max() > SAME:
                    differing.add(text)
    if differing:
        some = ", ".join(map(repr, sorted(differing)[:3]))
        log.warning("%d instruction(s) with more than one vector: %s", len(differing), some)
    found.pop("", None)
    if not found:
        raise UserError("encoder=use: no instruction in the data")
    texts = sorted(found)
    return texts, unit_rms(np.stack([found[text] for text in texts]))


if __name__ == "__main__":
    launch(TextTableConfig, main, "text_table", check=check)
