"""What fixes a fine-tuning run: every key of configs/finetune.yaml, and what follows from them."""

from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from selfflow.datasets.augment import Augment
from selfflow.policies.head import HeadConfig
from selfflow.policies.selection import words
from selfflow.worldmodel import flow
from selfflow.worldmodel.layout import ACTION_CHANNELS, TEXT_CHANNELS, Layout
from selfflow.worldmodel.loop import LoopConfig
from selfflow.worldmodel.model_config import ModelConfig
from selfflow.worldmodel.train_config import ModelSize, TrainConfig

MODES = ("full", "head", "last", "lora")
# keys of configs/train.yaml that say what the backbone was asked, and so may be given here again
_RUN = {f.name for f in fields(LoopConfig)}
_OWN = {"init", "model", "layout", "latents", "augment", "text", "text_path", "teacher", "extra"}
PRETRAINING = sorted({f.name for f in fields(TrainConfig)} - _RUN - _OWN - {"dry_run", "mfu"})
ROLLOUT = (
    "{python} -m selfflow.eval.simpler_rollout checkpoint={checkpoint} task={task} split=select "
    "seed=100000 episodes={episodes} videos=0 out={out}"
)


@dataclass(frozen=True)
class LoraSize:
    """Of the adapters: each is `alpha / rank` times a product of two matrices of that rank."""

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora: rank is at least 1 and alpha positive, got {self}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """Every key of configs/finetune.yaml, which explains them."""

    out: str = "outputs/policy"
    init: str | None = None
    scale_by: str | None = None
    text: str = "hash384"
    text_path: str | None = None
    model: ModelSize = field(default_factory=ModelSize)
    layout: Layout = field(default_factory=lambda: Layout(future=0))
    train: str = "full"
    last_blocks: int = 2
    lora: LoraSize = field(default_factory=LoraSize)
    keep_self_flow: float = 0.0
    keep_backbone: bool = False
    pretraining: dict[str, Any] = field(default_factory=dict)
    read_at: float = 0.7
    head_depth: int = 3
    draws: int = 4
    distribution: str = "uniform"
    time_shift: float = 1.0
    terminate_weight: float = 1.0
    shift: int = 4
    augment: Augment = field(default_factory=Augment)
    jitter: float = 0.0
    proprio_dropout: float = 0.0
    text_dropout: float = 0.0
    sampling_steps: int = 8
    execute: int = 4
    select_minutes: float = 0.0
    select_episodes: int = 20
    select_tasks: list[str] = field(default_factory=lambda: ["open_drawer_place"])
    select_command: str = ROLLOUT

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.draws, self.head_depth, self.sampling_steps) < 1 or self.shift < 0:
            raise ValueError(
                "draws, head_depth and sampling_steps are at least 1, shift at least 0"
            )
        if not 1 <= self.execute <= self.layout.chunk:
            raise ValueError(
                f"execute={self.execute}: choose 1 .. layout.chunk={self.layout.chunk}"
            )
        shares = self.proprio_dropout, self.text_dropout, self.jitter
        if not all(0 <= share < 1 for share in shares):
            raise ValueError("proprio_dropout, text_dropout and jitter lie in 0 .. 1")
        if self.scale_by not in (None, "data", "init"):
            raise ValueError(f"scale_by={self.scale_by}: choose data or init, or leave it out")
        if self.scale_by == "init" and self.init is None:
            raise ValueError("scale_by=init: there is no init; leave it out")
        if self.text not in TEXT_CHANNELS:
            raise ValueError(f"text={self.text}: choose one of {', '.join(TEXT_CHANNELS)}")
        if not 0 <= self.read_at <= 1:
            raise ValueError(f"read_at={self.read_at}: a share of the depth, in 0 .. 1")
        if self.jitter and self.layout.codec.kind != "patch":
            raise ValueError(
                f"jitter={self.jitter} changes pixels, not latents of "
                f"codec.kind={self.layout.codec.kind}; leave it at 0"
            )
        flow.Schedule(distribution=self.distribution, shift=self.time_shift)
        self._check_parts()
        self._check_selection()
        _ = self.encoder, self.head, self.backbone  # which check the model
        if self.train == "last" and self.last_blocks > self.read_block:
            raise ValueError(
                f"last_blocks={self.last_blocks}: read_at keeps {self.read_block} blocks; "
                f"choose 1..{self.read_block}, or train=full"
            )

    def _check_parts(self) -> None:
        """What is trained, and what is kept."""
        if self.train not in MODES:
            raise ValueError(f"train={self.train}: choose one of {', '.join(MODES)}")
        if self.last_blocks < 1 or self.keep_self_flow < 0:
            raise ValueError("last_blocks is at least 1, keep_self_flow not negative")
        if unknown := sorted(self.pretraining.keys() - set(PRETRAINING)):
            raise ValueError(
                f"pretraining.{unknown[0]}: no such key; choose of {', '.join(PRETRAINING)}"
            )
        if self.pretraining and not self.whole:
            raise ValueError("pretraining: only keep_self_flow and keep_backbone read it")
        if self.whole and not self.layout.future:
            raise ValueError(
                "layout.future=0: keep_self_flow and keep_backbone predict frames; give the "
                "layout of the pretraining, e.g. layout.future=1"
            )
        if self.layout.future and not self.whole:
            raise ValueError(
                "layout.future: a policy predicts no frames; leave it at 0, or choose "
                "keep_backbone=true or keep_self_flow"
            )
        if self.keep_self_flow and self.train == "head":
            raise ValueError("keep_self_flow trains the backbone: choose train=full, last or lora")
        if self.train in ("head", "last", "lora") and self.init is None:
            raise ValueError(f"train={self.train} keeps what init has learnt: give init=")

    def _check_selection(self) -> None:
        if self.select_minutes < 0 or self.select_episodes < 1:
            raise ValueError("select_minutes must not be negative, select_episodes at least 1")
        if self.select_minutes and not self.select_tasks:
            raise ValueError("select_tasks: name at least one, or leave select_minutes at 0")
        if self.select_minutes and self.save_async and self.keep < 2:
            raise ValueError("select_minutes with save_async needs keep >= 2")
        words(self.select_command, {"checkpoint": "", "task": "", "episodes": "", "out": ""})

    @property
    def whole(self) -> bool:
        """Whether the policy keeps all of the backbone, which can then predict frames."""
        return self.keep_backbone or self.keep_self_flow > 0

    @cached_property
    def kept(self) -> TrainConfig:
        """The pretraining's objective, of which keep_self_flow is the weight."""
        return TrainConfig(
            model=self.model,
            layout=self.layout,
            text=self.text,
            precision=self.precision,
            **self.pretraining,
        )

    @property
    def encoder(self) -> ModelConfig:
        """The backbone's part that reads the conditions."""
        modalities = self.layout.modalities(
            text=(1, TEXT_CHANNELS[self.text]), rope=self.model.positions == "rope"
        )
        whole = ModelConfig(**asdict(self.model), attention="prefix", modalities=modalities)
        return whole.encoder(whole.block_at(self.read_at))

    @property
    def read_block(self) -> int:
        """The 1-based block whose features of the conditions the head reads."""
        return self.encoder.depth

    @property
    def backbone(self) -> ModelConfig:
        """What is kept of the backbone: all of it, or the encoder."""
        return self.kept.transformer if self.whole else self.encoder

    @property
    def head(self) -> HeadConfig:
        """The action head, as wide as the backbone."""
        m = self.model
        return HeadConfig(
            m.hidden,
            self.head_depth,
            m.heads,
            m.mlp_ratio,
            self.layout.chunk,
            ACTION_CHANNELS,
            m.hidden,
        )
