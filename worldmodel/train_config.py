"""What fixes a pretraining run: every key of configs/train.yaml, and what follows from them."""

from dataclasses import asdict, dataclass, field
from functools import cached_property

from selfflow.datasets.augment import Augment
from selfflow.worldmodel import flow
from selfflow.worldmodel.layout import TEXT_CHANNELS, Extra, Layout, Weighting
from selfflow.worldmodel.loop import LoopConfig
from selfflow.worldmodel.model_config import ModelConfig


@dataclass(frozen=True)
class ModelSize:
    """A file of configs/model."""

    hidden: int = 192
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    family: str = "sit"
    double_blocks: int = 0
    positions: str = "sincos3d"


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Every key of configs/train.yaml, which explains them."""

    out: str = "outputs/pretrain"
    init: str | None = None
    model: ModelSize = field(default_factory=ModelSize)
    layout: Layout = field(default_factory=Layout)
    latents: str | None = None
    augment: Augment = field(default_factory=Augment)
    text: str = "hash384"
    text_path: str | None = None
    extra: dict[str, Extra] = field(default_factory=dict)
    attention: str = "prefix"
    objective: str = "self_flow"
    alignment: str = "auto"
    distribution: str = "uniform"
    time_shift: float = 1.0
    high_noise: float = 0.0
    sra_gap: float = 0.0
    context_noise: float = 0.0
    text_dropout: float = 0.1
    video_mask: float = 0.1
    action_mask: float = 0.1
    video_weight: float = 1.0
    action_weight: float = 1.0
    video_answer: str = "auto"
    gamma: float = 0.8
    student_at: float = 0.3
    teacher_at: float = 0.7
    teacher: str | None = None
    projector_layers: int = 2
    rep_tokens: str = "target"
    dry_run: bool = False
    mfu: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rep_tokens not in ("target", "all"):
            raise ValueError(f"rep_tokens={self.rep_tokens}: choose target or all")
        if self.text not in TEXT_CHANNELS:
            raise ValueError(f"text={self.text}: choose one of {', '.join(TEXT_CHANNELS)}")
        for key in ("text_dropout", "student_at", "teacher_at", "mfu"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: a share, must lie in 0 .. 1")
        if self.mfu == 0 or self.gamma < 0 or self.projector_layers < 1:
            raise ValueError(
                "mfu must be positive, gamma not negative, projector_layers at least 1"
            )
        if self.latents is not None and self.augment != Augment():
            raise ValueError("augment changes pixels, latents= holds encoded ones; choose one")
        keys = [e.key for e in self.extra.values()]
        if len(set(keys)) < len(keys):
            raise ValueError(f"extra: several modalities of one key ({', '.join(keys)})")
        student, teacher = self.blocks  # which also checks the model
        if (self.noise.alignment == "external") != (self.teacher is not None):
            raise ValueError(
                f"objective={self.objective}, teacher={self.teacher}: an external teacher goes "
                "with objective=repa or alignment=external; give its folder or hub id"
            )
        if self.noise.alignment == "external" and not self.layout.future:
            raise ValueError("layout.future=0: an external teacher needs future frames")
        if self.noise.alignment == "ema" and student >= teacher:
            raise ValueError(f"student block {student} must lie below teacher {teacher}")

    @cached_property
    def noise(self) -> flow.Schedule:
        """Timesteps and objective."""
        return flow.Schedule(
            self.objective,
            self.distribution,
            self.time_shift,
            self.context_noise,
            self.high_noise,
            self.alignment,
            self.sra_gap,
        )

    @cached_property
    def transformer(self) -> ModelConfig:
        """The model's full description."""
        answer = self.video_answer
        if answer == "auto":  # noise of more dimensions than the model is wide cannot be told
            answer = "data" if self.layout.channels > self.model.hidden else "velocity"
        weighting = Weighting(
            self.video_mask, self.action_mask, self.video_weight, self.action_weight, answer
        )
        modalities = self.layout.modalities(
            weighting, (1, TEXT_CHANNELS[self.text]), self.extra, self.model.positions == "rope"
        )
        return ModelConfig(**asdict(self.model), attention=self.attention, modalities=modalities)

    @property
    def blocks(self) -> tuple[int, int]:
        """Student's and teacher's block, 1-based."""
        return self.transformer.block_at(self.student_at), self.transformer.block_at(
            self.teacher_at
        )

    @property
    def aligned(self) -> slice:
        """The tokens of the whole sequence that the representation loss is over."""
        model = self.transformer
        if self.noise.alignment == "external":
            length = next(m.length for m in model.targets if m.name == "video")
            return slice(model.prefix_length, model.prefix_length + length)
        return slice(0 if self.rep_tokens == "all" else model.prefix_length, None)
