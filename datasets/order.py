"""Which window of which source is sample number i of a run: arithmetic alone, no state.

Samples are numbered from 0 over all steps and processes. So a run that goes on at step n, or on
another number of processes, meets the samples that it would have met, and no two processes meet the
same one.

Sources take turns by weight: after any number of samples each source has had its share of them to
within one or two. The n-th sample of a source of N windows is one of its epoch n // N, and every
epoch is a permutation of its own of all N, so that a window comes once an epoch.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

BITS = 32  # of a share in fixed point
ROUNDS = 8  # of the Feistel network
# of splitmix64
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SALTS = [np.uint64(number * GOLDEN % 2**64) for number in range(1, ROUNDS + 1)]
# A source's number, or (share of the first in 1 / 2**BITS, first, second).
Node = int | tuple[int, Any, Any]


class Turns:
    """Who gets sample i: a binary tree that gives each branch its share, evenly spread."""

    def __init__(self, weights: Sequence[float]) -> None:
        order = iter(range(2 * len(weights)))  # so that equal weights never compare nodes
        heap: list[tuple[float, int, Node]] = [
            (weight, next(order), source) for source, weight in enumerate(weights)
        ]
        heapq.heapify(heap)
        while len(heap) > 1:  # the lightest two become one, as in a Huffman code
            (light, _, a), (heavy, _, b) = heapq.heappop(heap), heapq.heappop(heap)
            share = round(2**BITS * heavy / (light + heavy))
            heapq.heappush(heap, (light + heavy, next(order), (share, b, a)))
        self.root = heap[0][2]

    def at(self, i: int) -> tuple[int, int]:
        """The source of sample i, and how many samples that source had before."""
        node = self.root
        while isinstance(node, tuple):
            share, first, second = node
            before, after = _had(i, share), _had(i + 1, share)
            node, i = (first, before) if after > before else (second, i - before)
        return node, i

    def counts(self, i: int) -> dict[int, int]:
        """How many of the samples before i each source had."""
        return dict(_counts(self.root, i))


def _had(i: int, share: int) -> int:
    return (i * share + (1 << BITS - 1)) >> BITS


def _counts(node: Node, i: int) -> Iterator[tuple[int, int]]:
    if isinstance(node, int):
        yield node, i
        return
    share, first, second = node
    yield from _counts(first, _had(i, share))
    yield from _counts(second, i - _had(i, share))


def key_of(*parts: str | int) -> int:
    """64 bits that depend on all parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permuted(
    n: Int64[np.ndarray, "B"], size: int, keys: UInt64[np.ndarray, "B"]
) -> Int64[np.ndarray, "B"]:
    """Where each n of 0 .. size - 1 goes in the permutation of that range that its key names.

    A Feistel network permutes 0 .. 2**bits - 1; what falls outside the range walks on along its
    cycle until it is inside.
    """
    bits = max(2, (size - 1).bit_length())
    x, outside = n.astype(np.uint64), np.ones(len(n), bool)
    while outside.any():
        x[outside] = _feistel(x[outside], bits, keys[outside])
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def _feistel(
    x: UInt64[np.ndarray, "B"], bits: int, keys: UInt64[np.ndarray, "B"]
) -> UInt64[np.ndarray, "B"]:
    low = np.uint64(bits // 2)
    masks = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    halves = [x & masks[0], x >> low]
    for number, salt in enumerate(SALTS):
        own, other = number % 2, 1 - number % 2
        halves[own] = halves[own] ^ (_mixed(halves[other] ^ (keys + salt)) & masks[own])
    return halves[0] | (halves[1] << low)


def _mixed(x: UInt64[np.ndarray, "B"]) -> UInt64[np.ndarray, "B"]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))
