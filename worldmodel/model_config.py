"""What fixes a model's weights and their meaning: its modalities, sizes and family of blocks."""

from dataclasses import asdict, dataclass, replace
from typing import Any

FAMILIES = ("sit", "flux")  # adaLN-Zero blocks; double and single blocks (flux_blocks.py)
POSITIONS = ("sincos3d", "sincos2d", "rope")  # two codes added to the tokens, one turns q and k
STREAMS = ("text", "main")
ANSWERS = ("velocity", "data")


@dataclass(frozen=True)
class Modality:
    """A kind of token. `grid` (frames, rows, columns) gives positions; its product is `length`."""

    name: str
    channels: int
    length: int
    role: str  # "condition" or "target"
    grid: tuple[int, int, int]
    mask_ratio: float = 0.0  # R_M: share of target tokens at the second timestep
    weight: float = 1.0  # of this modality in the loss
    stream: str = "main"  # or "text": which weights of a flux double block; text comes first
    clock: tuple[float, float] = (0.0, 1.0)  # frame i lies at time start + i · step
    answer: str = "velocity"  # of a target's output layer; or "data", from which velocity follows

    def __post_init__(self) -> None:
        frames, rows, columns = self.grid
        if self.stream not in STREAMS:
            raise ValueError(f"{self.name}: stream={self.stream}; choose {' or '.join(STREAMS)}")
        if self.answer not in ANSWERS:
            raise ValueError(f"{self.name}: answer={self.answer}; choose {' or '.join(ANSWERS)}")
        if self.role not in ("condition", "target"):
            raise ValueError(f"{self.name}: role={self.role}; choose condition or target")
        if self.channels < 1 or self.length < 1 or frames * rows * columns != self.length:
            raise ValueError(f"{self.name}: {self.length} tokens do not fill the grid {self.grid}")
        if self.weight < 0:
            raise ValueError(f"{self.name}: weight={self.weight} must not be negative")
        if not 0 <= self.mask_ratio <= 0.5:
            raise ValueError(f"{self.name}: mask_ratio={self.mask_ratio} is not within 0 .. 0.5")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the weights' shapes and meaning."""

    hidden: int
    depth: int
    heads: int
    mlp_ratio: float
    attention: str  # "prefix" or "full"
    modalities: tuple[Modality, ...]  # conditions come first
    family: str = "sit"  # or "flux"
    double_blocks: int = 0  # flux: so many of `depth` are double, the rest single
    positions: str = "sincos3d"  # or sincos2d (row and column only), or rope
    classes: int = 0  # rows of the label table, the last is "no label"; 0: no labels

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.hidden % self.heads or self.hidden < 6:
            raise ValueError(
                f"hidden={self.hidden} must be a multiple of heads={self.heads} and >= 6, "
                f"depth={self.depth} >= 1"
            )
        for key, choices in (
            ("attention", ("prefix", "full")),
            ("family", FAMILIES),
            ("positions", POSITIONS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose {' or '.join(choices)}")
        self._check_widths()
        if self.classes < 0:
            raise ValueError(f"classes={self.classes}: 0, or the label table's rows")
        self._check_modalities()
        self._check_double_blocks()

    def _check_widths(self) -> None:
        if self.hidden * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: must be positive")
        if self.positions == "rope" and self.hidden // self.heads % 6:
            raise ValueError(
                f"positions=rope: hidden={self.hidden} over heads={self.heads} must be "
                "a multiple of 6"
            )
        if self.positions == "sincos2d" and self.hidden % 4:
            raise ValueError(f"positions=sincos2d: hidden={self.hidden} must be a multiple of 4")

    def _check_modalities(self) -> None:
        names = [m.name for m in self.modalities]
        if len(set(names)) != len(names):
            raise ValueError(f"modality names repeat: {', '.join(names)}")
        roles = [m.role for m in self.modalities]
        if roles != sorted(roles) or not roles:
            raise ValueError("modalities: conditions come first; at least one is needed")
        texts = [m.stream == "text" for m in self.modalities]
        if texts != sorted(texts, reverse=True):
            raise ValueError("modalities: those of stream=text come first")

    def _check_double_blocks(self) -> None:
        most = self.depth if self.family == "flux" else 0
        if not 0 <= self.double_blocks <= most:
            raise ValueError(
                f"double_blocks={self.double_blocks}: 0 .. {most} for family={self.family}"
            )
        if self.double_blocks and all(m.stream == "main" for m in self.modalities):
            raise ValueError(
                f"double_blocks={self.double_blocks} needs a modality of stream=text, which "
                "goes with positions=rope; else choose double_blocks=0"
            )

    @property
    def conditions(self) -> tuple[Modality, ...]:
        """Modalities that are given."""
        return tuple(m for m in self.modalities if m.role == "condition")

    @property
    def targets(self) -> tuple[Modality, ...]:
        """Modalities that are predicted."""
        return tuple(m for m in self.modalities if m.role == "target")

    @property
    def prefix_length(self) -> int:
        """Number of condition tokens."""
        return sum(m.length for m in self.conditions)

    @property
    def target_length(self) -> int:
        """Number of target tokens."""
        return sum(m.length for m in self.targets)

    def block_at(self, fraction: float) -> int:
        """The 1-based block nearest to that fraction of the depth: 0.3 student, 0.7 teacher."""
        nearest = int(round(fraction * self.depth, 9) + 0.5)  # half up; 0.7 * 45 is 31.499...
        return min(self.depth, max(1, nearest))

    def encoder(self, block: int) -> "ModelConfig":
        """The part that reads conditions up to that block: what a policy keeps."""
        double = min(self.double_blocks, block)
        return replace(self, depth=block, double_blocks=double, modalities=self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of to_dict; keys that an older version did not have take their defaults."""
        rest = {k: v for k, v in values.items() if k != "modalities"}
        return cls(**rest, modalities=tuple(_modality(m) for m in values["modalities"]))


def _modality(values: dict[str, Any]) -> Modality:
    tuples: dict[str, Any] = {k: tuple(values[k]) for k in ("grid", "clock") if k in values}
    return Modality(**values | tuples)
