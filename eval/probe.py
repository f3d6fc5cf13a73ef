"""A linear probe: how much of the simulator's true state can be read off frozen features.

For each block of the moving-average model, ridge regression maps the features of one frame to the
top drawer's opening (m), the apple's position in the robot's base frame (x, y, z, m; one R² of all
three) and the measured gripper opening, at that frame's step.

| features | of | at time |
|---|---|---|
| context | the last context frame's tokens, in the pass over conditions alone | 0: clean |
| video | the last predicted latent frame's tokens, noised by tau | tau |

Block 0 are the codec's own tokens, clean or noised alike: what the model is given.

What would give the answer away is kept from the model. Proprioception and actions are marked absent
(the learned null), since attention carries the gripper from their tokens to all; the instruction
is each episode's first at all steps, since "place the apple" says that the drawer is open.
Video tokens do see the clean context frame, `stride` steps earlier, as in use.

The main definition, `pooling="grid"`: the frame's tokens, averaged within a grid of 4 x 5 cells and
concatenated. A position needs to know *where* a feature is; the mean over all tokens (`"mean"`,
reported too) loses that, and all tokens unpooled would be 15,360 numbers a frame for some hundred
frames. Features are centred, not scaled: one that hardly ever moves would grow huge. The
regression is in closed form, with a free constant; its strength is the one of least error when each
training episode is left out in turn, which needs no refit: e_b = (I - H_bb)^-1 r_b. Episodes are
dealt into `folds`, and each is predicted by a regression on the others only; R² is over all these
predictions, its interval from resampling episodes.

N samples, E episodes, L tokens, D width, F features, Y numbers of all targets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfflow.datasets.episodes import EpisodeSource, Measures
from selfflow.datasets.rotations import inverse, rotate
from selfflow.datasets.spec import OPENING, UserError
from selfflow.eval.bootstrap import Estimate, estimate, resamples
from selfflow.eval.world import Windows, World, load_world
from selfflow.worldmodel.batches import Inputs
from selfflow.worldmodel.flow import interpolate
from selfflow.worldmodel.transformer import VideoActionTransformer

GRID = (4, 5)  # rows and columns of the pooled frame
TARGETS = {"drawer": slice(0, 1), "apple": slice(1, 4), "gripper": slice(4, 5)}  # of Y
STRENGTHS = 10.0 ** np.arange(-6, 4)  # of the ridge, in units of the kernel's mean eigenvalue


@dataclass(frozen=True)
class ProbeConfig:
    """How much is probed, and how."""

    frames: int = 10  # an episode
    folds: int = 4
    taus: tuple[float, ...] = (0.1, 0.5)
    resamples: int = 1000
    batch: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One regression's R² on episodes that it did not see, with its 95 % interval."""

    name: str  # of the checkpoint
    pooling: str  # grid or mean
    layer: int  # block, 1-based; 0: the codec's tokens
    tokens: str  # context or video
    tau: float
    target: str
    r2: float
    low: float
    high: float
    estimate: Estimate = field(repr=False, compare=False)


@dataclass(frozen=True)
class Samples:
    """Which frames are probed: (episode of the source, step), and what was true there."""

    windows: Windows
    places: list[tuple[int, int]]
    episode: Int[np.ndarray, "N"]  # numbered through all sources
    now: Float[np.ndarray, "N Y"]  # at the context frame
    then: Float[np.ndarray, "N Y"]  # at the last predicted frame


def probe(
    checkpoint: "World | str",
    sources: Sequence[tuple[EpisodeSource, Sequence[int]]],
    config: ProbeConfig | None = None,
) -> list[Row]:
    """All regressions of one checkpoint on these episodes of each source. Raises UserError."""
    config = config or ProbeConfig()
    world = load_world(checkpoint) if isinstance(checkpoint, str) else checkpoint
    samples, first = [], 0
    for source, episodes in sources:
        samples.append(choose(source, episodes, world, config.frames, first))
        first += len(episodes)
    if first < max(config.folds, 2) or config.folds < 2:
        raise UserError(f"probe: {first} episodes in {config.folds} folds; give 2 folds or more")
    episode = np.concatenate([s.episode for s in samples])
    fold = np.random.default_rng(config.seed).permutation(first) % config.folds
    weights = resamples(first, config.resamples, config.seed)
    rows = []
    for tokens, tau in (("context", 0.0), *(("video", tau) for tau in config.taus)):
        truth = np.concatenate([s.now if tokens == "context" else s.then for s in samples])
        found = [list(_pooled(world, s, tokens, tau, config)) for s in samples]
        for layer, parts in enumerate(zip(*found, strict=True)):
            for pooling in ("grid", "mean"):
                x = np.concatenate([part[pooling] for part in parts])
                guess = cross_fitted(x, truth, episode, fold)
                for target, columns in TARGETS.items():
                    e = r2(truth[:, columns], guess[:, columns], episode, weights)
                    where = (world.name, pooling, layer, tokens, tau, target)
                    rows.append(Row(*where, e.value, e.low, e.high, e))
    return rows


def random_world(world: World, seed: int = 0) -> World:
    """The same model with random weights. Those that training starts from at zero are drawn too:
    left alone, their gates would stay shut and every block hand on its input."""
    torch.manual_seed(seed)
    model = VideoActionTransformer(world.model.config)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=0.5)
    model = model.eval().requires_grad_(False).to(world.device)
    return replace(world, model=model, name=f"random weights ({model.config.attention})")


def choose(
    source: EpisodeSource, episodes: Sequence[int], world: World, frames: int, first: int
) -> Samples:
    """Steps spread evenly over each episode, up to the last whose predicted frame it still has."""
    ahead = world.layout.frame_offsets[-1]
    places, number, now, then = [], [], [], []
    for offset, i in enumerate(episodes):
        last = source.length(i) - 1 - ahead
        steps = np.unique(np.linspace(0, max(last, 0), frames).round().astype(int))
        truth = true_state(source, i)
        places += [(i, int(t)) for t in steps]
        number += [first + offset] * len(steps)
        now.append(truth[steps])
        then.append(truth[np.minimum(steps + ahead, len(truth) - 1)])
    parts = (np.array(number), np.concatenate(now), np.concatenate(then))
    return Samples(Windows(source, world.layout), places, *parts)


def cross_fitted(
    x: Float[np.ndarray, "N F"],
    y: Float[np.ndarray, "N Y"],
    episode: Int[np.ndarray, "N"],
    fold: Int[np.ndarray, "E"],
) -> Float[np.ndarray, "N Y"]:
    """Every row's prediction by a regression on the episodes of the other folds."""
    guess = np.zeros_like(y)
    for k in np.unique(fold):
        test = fold[episode] == k
        guess[test] = ridge(x[~test], y[~test], episode[~test], x[test])
    return guess


def ridge(
    x: Float[np.ndarray, "N F"],
    y: Float[np.ndarray, "N Y"],
    episode: Int[np.ndarray, "N"],
    new: Float[np.ndarray, "M F"],
) -> Float[np.ndarray, "M Y"]:
    """Predictions for `new`; each column of y at its strength of least leave-one-out error.

    Written with the kernel X Xᵀ, since there are fewer samples than features.
    """
    x, new = x.astype(np.float64), new.astype(np.float64)
    x, new = x - x.mean(0), new - x.mean(0)
    values, vectors = np.linalg.eigh(x @ x.T)
    values = values.clip(0)
    constant = y.mean(0)
    turned = vectors.T @ (y - constant)
    strengths = STRENGTHS * max(values.mean(), 1e-30)
    errors = [_left_out(values, vectors, y - constant, turned, episode, k) for k in strengths]
    best = strengths[np.argmin(errors, axis=0)]  # (Y,)
    dual = vectors @ (turned / (values[:, None] + best))
    return constant + (new @ x.T) @ dual


def r2(
    truth: Float[np.ndarray, "N Y"],
    guess: Float[np.ndarray, "N Y"],
    episode: Int[np.ndarray, "N"],
    weights: Int[np.ndarray, "R E"],
) -> Estimate:
    """1 - squared error / squared distance from the mean, over all columns together."""

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(episode, values, weights.shape[1])

    error = total(np.square(truth - guess).sum(1))
    square, count = total(np.square(truth).sum(1)), total(np.ones(len(truth)))
    sums = np.stack([total(column) for column in truth.T], 1)

    def statistic(w: np.ndarray) -> np.ndarray:
        spread = w @ square - np.square(w @ sums).sum(1) / (w @ count)
        known = spread > 1e-9 * (w @ square)
        return np.where(known, 1 - (w @ error) / np.where(known, spread, 1), np.nan)

    return estimate(statistic, weights)


def _left_out(
    values: np.ndarray,
    vectors: np.ndarray,
    y: np.ndarray,
    turned: np.ndarray,
    episode: np.ndarray,
    strength: float,
) -> Float[np.ndarray, "Y"]:
    """Squared error of each episode predicted without it: exact, without fitting again."""
    kept = values / (values + strength)
    residual = y - vectors @ (kept[:, None] * turned)
    error = np.zeros(y.shape[1])
    for one in np.unique(episode):
        rows = episode == one
        u = vectors[rows]
        hat = (u * kept) @ u.T + 1 / len(y)  # of the rows' own say, the constant's included
        error += np.square(np.linalg.solve(np.eye(len(u)) - hat, residual[rows])).sum(0)
    return error


def true_state(source: EpisodeSource, i: int) -> Float[np.ndarray, "T Y"]:
    """Drawer opening, apple position seen from the robot's base, gripper opening, by step.

    Raises UserError where the data do not hold them.
    """
    parts = {}
    for key in ("drawers", "apple", "base"):
        found = source.measured(i, key) if isinstance(source, Measures) else None
        if found is None:
            raise UserError(
                f"probe: {source.name} does not hold the simulator's {key}; give data of "
                "open_drawer_place recorded with eval/record_demos.py, or parts without probe"
            )
        parts[key] = found.astype(np.float64)
    apple, base = parts["apple"][:, :3], parts["base"]
    seen = rotate(inverse(base[:, 3:]), apple - base[:, :3])
    opening = source.signals(i).proprio[:, OPENING, None]
    return np.concatenate([parts["drawers"][:, :1], seen, opening], 1)


def _pooled(
    world: World, samples: Samples, tokens: str, tau: float, config: ProbeConfig
) -> Iterator[dict[str, Float[np.ndarray, "N F"]]]:
    """Block by block, 0 first, the samples' features by pooling."""
    generator = torch.Generator().manual_seed(config.seed)
    read = _context if tokens == "context" else _video
    batches = []
    for start in range(0, len(samples.places), config.batch):
        inputs = _inputs(world, samples, samples.places[start : start + config.batch])
        with torch.no_grad():
            layers = read(world, inputs, tau, generator)
            batches.append([_pool(world, x) for x in layers])
    for parts in zip(*batches, strict=True):
        yield {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def _inputs(world: World, samples: Samples, places: Sequence[tuple[int, int]]) -> Inputs:
    """Tokens of these windows, without what gives the answer away."""
    batch = samples.windows.at(places)
    told = [samples.windows.source.signals(i).instruction[0] for i, _ in places]
    inputs = world.reader.tokens(replace(batch, instruction=told), world.device)
    tokens, valid = dict(inputs.tokens), dict(inputs.valid)
    for m in world.model.config.modalities:
        if m.name == "proprio" or (m.role == "target" and m.name != "video"):
            tokens[m.name] = tokens["context"].new_zeros(len(places), m.length, m.channels)
            valid[m.name] = torch.zeros_like(tokens[m.name][..., 0], dtype=torch.bool)
    return replace(inputs, tokens=tokens, valid=valid)


def _context(
    world: World, inputs: Inputs, tau: float, generator: torch.Generator
) -> list[Float[Tensor, "B L D"]]:
    """Of the last context frame, after every block; they are clean, so nothing is drawn."""
    model, before = world.model, 0
    for m in model.config.conditions:
        if m.name == "context":
            break
        before += m.length
    now = torch.full((len(inputs.tokens["context"]),), tau, device=world.device)
    prefix = model.prefix(inputs.tokens, now, inputs.valid)
    after = before + inputs.tokens["context"].shape[1]
    layers = [inputs.tokens["context"], *(x[:, before:after] for x in prefix.features)]
    return [_last_frame(world, x) for x in layers]


def _video(
    world: World, inputs: Inputs, tau: float, generator: torch.Generator
) -> list[Float[Tensor, "B L D"]]:
    """Of the last predicted latent frame at time tau, after every block."""
    model, video = world.model, inputs.tokens["video"]
    noise = torch.randn(video.shape, generator=generator).to(video.device)
    noised = interpolate(video, noise, video.new_full(video.shape[:2], tau))
    times = video.new_tensor([0.0, tau]).expand(len(video), 2)
    groups = [torch.full((m.length,), int(m.role == "target")) for m in model.config.modalities]
    group = torch.cat(groups).to(video.device).expand(len(video), -1)
    streams: list[Tensor] = [video] * model.config.depth

    def keep(n: int) -> Callable[..., None]:
        def hook(block: nn.Module, given: tuple, found: tuple[Tensor, object]) -> None:
            streams[n] = found[0]  # of a block's calls the last: the one with the targets

        return hook

    hooks = [block.register_forward_hook(keep(n)) for n, block in enumerate(model.blocks)]
    model(inputs.tokens | {"video": noised}, times, group, inputs.valid)
    for hook in hooks:
        hook.remove()
    names = [m.name for m in model.config.targets]
    behind = sum(m.length for m in model.config.targets[names.index("video") + 1 :])
    layers = [x[:, : x.shape[1] - behind] for x in streams]  # what follows it are other targets
    return [_last_frame(world, x) for x in (noised, *layers)]


def _last_frame(world: World, x: Tensor) -> Tensor:
    rows, columns, _ = world.codec.latent_shape
    return x[:, -rows * columns :]


def _pool(world: World, x: Float[Tensor, "B L D"]) -> dict[str, np.ndarray]:
    rows, columns, _ = world.codec.latent_shape
    image = x.float().unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    grid = F.adaptive_avg_pool2d(image, GRID).flatten(1)
    return {"grid": grid.cpu().numpy(), "mean": x.float().mean(1).cpu().numpy()}
