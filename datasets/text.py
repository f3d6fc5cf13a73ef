"""Instructions as vectors, without a language model: hashed words.

Every lower-cased word and pair of neighbouring words stands for 384 signs read off a hash; an
instruction is their sum at unit root mean square. Equal words mean close vectors and nothing more:
"shut" is as far from "close" as from "apple". The shape is that of MiniLM's sentence vectors, so
that an encoder that understands can take its place. Stable across processes and versions.
"""

import hashlib
import re
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

ENCODER = "hash384"  # named in checkpoints
TEXT_DIM = 384
TEXT_TOKENS = 1


@lru_cache(100_000)
def embed(instruction: str) -> Float32[np.ndarray, "1 384"]:
    """One instruction as a row of unit root mean square; zeros if it has no word. Read-only."""
    words = re.findall(r"\w+", instruction.lower())
    terms = words + [f"{a} {b}" for a, b in pairwise(words)]
    total = np.sum([_signs(term) for term in terms], axis=0) if terms else np.zeros(TEXT_DIM)
    scale = np.sqrt(np.mean(np.square(total)))
    vector = (total / (scale or 1.0)).astype(np.float32)[None]
    vector.flags.writeable = False
    return vector


def embed_batch(instructions: list[str]) -> Float32[np.ndarray, "B 1 384"]:
    """Instructions as (B, 1, 384)."""
    return np.stack([embed(text) for text in instructions])


def _signs(term: str) -> np.ndarray:
    digest = hashlib.blake2b(term.encode(), digest_size=TEXT_DIM // 8).digest()
    return 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8)) - 1.0
