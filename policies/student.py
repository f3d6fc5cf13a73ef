"""What fine-tuning trains: the model filled from `init`, with the parts that stay frozen."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from selfflow.datasets.spec import UserError
from selfflow.datasets.text import text_encoder
from selfflow.policies import lora
from selfflow.policies.finetune_config import FinetuneConfig
from selfflow.policies.head import PolicyModel
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import Checkpoint, fill, load, parts_of
from selfflow.worldmodel.codec import resolved
from selfflow.worldmodel.layout import Layout, Robots
from selfflow.worldmodel.model_config import ModelConfig

Weights = dict[str, Tensor]
# what makes two modalities the same; how often they are masked and weighted is a run's own
SAME = ("name", "channels", "length", "role", "grid", "stream", "clock", "answer")


def build(config: FinetuneConfig) -> tuple[PolicyModel, Robots | None]:
    """Backbone and head, filled from `init`, and the embodiments that `init` knows."""
    layers = config.kept.projector_layers if config.keep_self_flow else 0
    student, robots = PolicyModel(config.backbone, config.head, config.read_block, layers), None
    if config.init is not None:
        with user_errors():
            given = load(config.init)
            check_init(config, given)
            print(f"init: {given.path}, {_take(student, given)}")
            with parts_of(given.path):
                robots = Robots(*(tuple(v) for v in given.config["embodiments"].values()))
    if config.train == "lora":
        depth = config.backbone.depth if config.keep_self_flow else config.read_block
        lora.add(student.backbone, config.lora.rank, config.lora.alpha, depth)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained(name, config))
    return student, robots


def trained(name: str, config: FinetuneConfig) -> bool:
    """Whether the student's parameter of this name is trained; the others stay to the bit."""
    part, *rest = name.split(".")
    if part != "backbone":  # the head, and the projector of a loss that is kept
        return True
    if config.train == "lora":
        return lora.is_adapter(name)
    if config.train == "head":
        return False
    beyond = rest[0] in ("final", "outputs")  # the action head looks at no target
    number = int(rest[1]) if rest[0] == "blocks" else None
    unused = beyond or (number is not None and number >= config.read_block)
    if unused and not config.keep_self_flow:
        return False
    if config.train == "last":
        return beyond or (number is not None and number >= config.read_block - config.last_blocks)
    return True


def usable(weights: Weights, config: FinetuneConfig) -> Weights:
    """What a policy needs of the student's weights: adapters merged, no projector."""
    if config.train == "lora":
        weights = lora.merged(weights, config.lora.scale)
    return {k: v for k, v in weights.items() if not k.startswith("projector.")}


def _take(student: PolicyModel, given: Checkpoint) -> str:
    """Fills what `given` has of the student; says what was taken."""
    wanted, have = student.backbone.state_dict(), given.part("backbone")
    fill(student.backbone, {k: have[k] for k in wanted if k in have}, str(given.path))
    if given.config["kind"] == "policy":
        fill(student.head, given.part("head"), str(given.path))
    projector, rest = given.part("projector"), ""
    if isinstance(mine := getattr(student, "projector", None), nn.Module):
        rest = ", a fresh projector"
        if {k: v.shape for k, v in projector.items()} == _shapes(mine):
            fill(mine, projector, str(given.path))
            rest = ", its projector"
    return (
        f"{len(wanted)} tensors of the backbone taken, {len(have) - len(wanted)} not needed{rest}"
    )


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {k: v.shape for k, v in module.state_dict().items()}


def check_init(config: FinetuneConfig, given: Checkpoint) -> None:
    """Raises UserError if the backbone to start from is of another shape or reads other texts or
    latents, CheckpointError if it is damaged."""
    with parts_of(given.path):
        theirs = ModelConfig.from_dict(given.config["model"])
    block = config.read_block
    if theirs.depth < block:
        raise UserError(f"init={config.init} has {theirs.depth} blocks, read_at needs {block}")
    if config.whole and not theirs.targets:
        raise UserError(
            f"init={config.init} has no later blocks nor outputs any more, which keep_self_flow "
            "and keep_backbone need; start from the pretraining, or a policy that kept them"
        )
    if not config.whole:
        theirs = replace(theirs.encoder(block), attention="prefix")
    part, mine = _comparable(theirs), _comparable(config.backbone)
    differ = [f"{k} (init {part[k]}, here {mine[k]})" for k in mine if part[k] != mine[k]]
    if differ:
        cure = "model=, layout. and pretraining." if config.whole else "model= and layout."
        raise UserError(
            f"init={config.init} is another model: {', '.join(differ)}; "
            f"give the {cure} of the pretraining"
        )
    _check_reading(config, given)


def _comparable(model: ModelConfig) -> dict[str, Any]:
    values = model.to_dict()
    return values | {"modalities": [{k: m[k] for k in SAME} for m in values["modalities"]]}


def _check_reading(config: FinetuneConfig, given: Checkpoint) -> None:
    with parts_of(given.path):
        reads, codec = given.config["text_encoder"], Layout.from_dict(given.config["layout"]).codec
    text = text_encoder(config.text, config.text_path).name
    if reads != text:
        raise UserError(f"init={config.init} reads {reads} vectors, text={config.text} is {text}")
    own = config.layout.codec
    if (codec.kind, resolved(codec)) != (own.kind, resolved(own)):
        raise UserError(
            f"init={config.init} has codec.kind={codec.kind}, scale={resolved(codec).scale}; "
            f"here it is {own.kind}, {resolved(own).scale}"
        )
