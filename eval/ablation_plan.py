"""The jobs of an ablation, in order: each one public command, and what it leaves.

    out/SIZE/PRETRAINING/SEED/pretrain     worldmodel/train.py
    ...                       curve        eval/world_model.py: held-out loss, probe, by checkpoint
    ...                       video        eval/world_model.py: imagined video, actions, at the end
    out/SIZE/ARM/SEED/finetune             policies/finetune.py
    ...               rollout-001000       eval/simpler_rollout.py, at a fraction of the fine-tuning

An arm's run at one seed is all of that; sizes other than the first stop after `curve`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from selfflow.eval.ablation_config import ARMS, MAIN, REFERENCE, AblationConfig, Arm
from selfflow.worldmodel.checkpoint import folder

PRETRAIN, CURVE, VIDEO, FINETUNE, ROLLOUT = "pretrain", "curve", "video", "finetune", "rollout"
MODULES = {
    PRETRAIN: "selfflow.worldmodel.train",
    CURVE: "selfflow.eval.world_model",
    VIDEO: "selfflow.eval.world_model",
    FINETUNE: "selfflow.policies.finetune",
    ROLLOUT: "selfflow.eval.simpler_rollout",
}


@dataclass(frozen=True)
class Job:
    """One command. `name` is its folder below the ablation's `out`, and its key in the records."""

    name: str
    kind: str  # a key of MODULES
    out: Path
    arguments: tuple[str, ...]  # what its outcome depends on
    free: tuple[str, ...] = ()  # what it does not
    steps: tuple[
        int, ...
    ] = ()  # of a training: its checkpoints that are looked at, the last one its end
    needs: tuple[str, ...] = ()  # names of the trainings that it reads

    @property
    def command(self) -> list[str]:
        """After the interpreter."""
        return ["-m", MODULES[self.kind], *self.arguments, f"out={self.out}", *self.free]


@dataclass(frozen=True)
class Run:
    """An arm at one size and training seed."""

    size: str
    arm: str
    seed: int
    jobs: tuple[Job, ...] = field(repr=False)

    def job(self, kind: str) -> Job:
        """Its last of that kind. A ValueError where it has none."""
        found = [job for job in self.jobs if job.kind == kind]
        if not found:
            raise ValueError(f"{self}: has no {kind}")
        return found[-1]

    @property
    def rollouts(self) -> list[Job]:
        """By fraction."""
        return [job for job in self.jobs if job.kind == ROLLOUT]


def planned(config: AblationConfig) -> list[Run]:
    """All runs, those of the main size first."""
    seeds = range(config.trainings)
    main = [Run(MAIN, arm, s, tuple(_jobs(config, MAIN, arm, s))) for arm in ARMS for s in seeds]
    arms = sorted(config.size_arms, key=list(ARMS).index)
    return main + [
        Run(size, arm, s, tuple(_pretraining(config, size, ARMS[arm], s))[:-1])
        for size in config.sizes
        for arm in arms
        for s in seeds
    ]


def chosen(config: AblationConfig) -> list[Job]:
    """The jobs of the sitting, each once: of the runs that `only` and `seeds` name, or of all."""
    jobs: dict[str, Job] = {}
    for run in planned(config):
        wanted = not config.only or run.arm in config.only or run.size in config.only
        if wanted and (not config.seeds or run.seed in config.seeds):
            jobs |= {job.name: job for job in run.jobs}
    return list(jobs.values())


def _jobs(config: AblationConfig, size: str, name: str, seed: int) -> list[Job]:
    arm, out = ARMS[name], Path(config.out, size, name, str(seed))
    before = _pretraining(config, size, arm, seed) if arm.objective else []
    arguments = [f"model={config.model}", f"data=[{','.join(config.paths)}]", f"seed={seed}"]
    arguments += [f"steps={config.finetune_steps}", *config.finetune]
    if arm.objective:
        end = _folder(config, size, arm.pretraining, seed) / PRETRAIN
        arguments.append(f"init={folder(end, config.pretrain_steps)}")
    if arm.kept:
        arguments += ["layout.future=1", f"keep_self_flow={config.kept_weight}"]
        arguments += [f"+pretraining.attention={arm.attention}"]
    made = _training(config, FINETUNE, out, arguments, config.save_every, config.marks)
    made = replace(made, needs=tuple(job.name for job in before if job.kind == PRETRAIN))
    return [*before, made, *(_rollout(config, out, made, step) for step in config.marks)]


def _pretraining(config: AblationConfig, size: str, arm: Arm, seed: int) -> list[Job]:
    """With the teacher's before it, where it has one."""
    out = _folder(config, size, arm.pretraining, seed)
    arguments = [*_model(config, size), f"objective={arm.objective}", f"attention={arm.attention}"]
    arguments += [f"data=[{','.join(config.paths)}]", f"seed={seed}"]
    arguments += [f"steps={config.pretrain_steps}", *config.pretrain]
    before: list[Job] = []
    if arm.objective == "repa":
        before = _pretraining(config, size, ARMS[REFERENCE], seed)[:1]
        arguments.append(f"teacher={folder(before[0].out, config.pretrain_steps)}")
    train = _training(config, PRETRAIN, out, arguments, config.points[0], config.points)
    train = replace(train, needs=tuple(job.name for job in before))
    return [*before, train, *(_measure(config, out, kind, train) for kind in (CURVE, VIDEO))]


def _training(
    config: AblationConfig, kind: str, out: Path, arguments: list[str], every: int, at: list[int]
) -> Job:
    # checkpoints that are not looked at are deleted when it is done
    free = (f"threads={config.threads}", f"save_every={every}", "keep=1000")
    return Job(_name(config, out / kind), kind, out / kind, tuple(arguments), free, tuple(at))


def _measure(config: AblationConfig, out: Path, kind: str, trained: Job) -> Job:
    """The world model's own measures: of all checkpoints, or of the last one."""
    paths = [folder(trained.out, step) for step in trained.steps]
    parts, given, shown = "video,actions", config.video, paths[-1:]
    if kind == CURVE:
        parts, given, shown = "loss,probe", config.curve, paths
    arguments = (
        f"checkpoint=[{','.join(map(str, shown))}]",
        f"data=[{config.heldout}]",
        f"parts=[{parts}]",
        "random=false",
        *given,
    )
    free = (f"threads={config.threads}",)
    needs = (trained.name,)
    return Job(_name(config, out / kind), kind, out / kind, arguments, free, needs=needs)


def _rollout(config: AblationConfig, out: Path, trained: Job, step: int) -> Job:
    place = out / f"{ROLLOUT}-{step:06d}"
    arguments = (
        f"task={config.task}",
        f"checkpoint={folder(trained.out, step)}",
        f"seed={config.seed}",
        f"episodes={config.episodes}",
        "videos=0",
        *config.rollout,
    )
    free, needs = (f"workers={config.workers}",), (trained.name,)
    return Job(_name(config, place), ROLLOUT, place, arguments, free, needs=needs)


def _model(config: AblationConfig, size: str) -> list[str]:
    own = {} if size == MAIN else config.sizes[size]
    return [f"model={config.model}", *(f"model.{key}={value}" for key, value in own.items())]


def _folder(config: AblationConfig, size: str, name: str, seed: int) -> Path:
    return Path(config.out, size, name, str(seed))


def _name(config: AblationConfig, out: Path) -> str:
    return str(out.relative_to(config.out))
