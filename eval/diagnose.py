"""python eval/diagnose.py folder=outputs/rollout   (some minutes, of which a funnel takes none)

Says which stage loses the episodes of a rollout: how many came through each phase, where each
failure stopped and how near it was, and, of the first failures run again, how the next actions
change when a part of the picture is covered. With held-out demonstrations also the open-loop error
by phase:

    python eval/diagnose.py folder=outputs/rollout data=[data/open_drawer_place_heldout]

Writes report.md, failures.png and diagnosis.json to `out`. Every key: configs/diagnose.yaml.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfflow.configs.entry import compose, launch, typed
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import Observation, UserError
from selfflow.eval import diagnose_funnel as funnels
from selfflow.eval import parts, results
from selfflow.eval.diagnose_funnel import Failure
from selfflow.eval.diagnose_open_loop import episodes_of, open_loop, section
from selfflow.eval.diagnose_saliency import (
    KINDS,
    decider,
    overlaid,
    run_again,
    saliency,
    same,
)
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.rollout import Episode
from selfflow.eval.video import captioned, contact_sheet, thumbnail
from selfflow.eval.world_tables import Section
from selfflow.policies.acting import ChunkPolicy
from selfflow.policies.base import Policy
from selfflow.policies.limits import Limiter, Limits
from selfflow.worldmodel.batches import user_errors
from selfflow.worldmodel.checkpoint import read_json

REPORT, SHEET, DIAGNOSIS = "report.md", "failures.png", "diagnosis.json"


@dataclass(frozen=True)
class DiagnoseConfig:
    """Every key of configs/diagnose.yaml, which explains them."""

    folder: str
    checkpoint: str | None
    failures: int
    rows: int
    columns: int
    draws: int
    data: Any
    demonstrations: int
    bootstrap: int
    seed: int
    out: str

    def __post_init__(self) -> None:
        least = {"failures": 0, "rows": 1, "columns": 1, "draws": 1, "demonstrations": 1}
        for key, low in (least | {"bootstrap": 2, "seed": 0}).items():
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)}: must be {low} or more")

    @property
    def paths(self) -> list[str]:
        """Of the demonstrations: one or several, as a list."""
        return [self.data] if isinstance(self.data, str) else [str(path) for path in self.data]


def check(config: DiagnoseConfig) -> None:
    """Raises UserError for what can be known before anything is written."""
    rollout = recorded(config)
    episodes_with_phases(config)
    if config.paths:
        if rollout.policy != "checkpoint":
            raise UserError(f"data: policy={rollout.policy} predicts no actions; leave data=[]")
        for source in open_sources(config.paths)[0]:
            episodes_of(source, rollout.spec, config.demonstrations)


def main(config: DiagnoseConfig) -> dict[str, Any]:
    """Reads, runs again what it shows, writes and prints; returns what diagnosis.json holds."""
    console = Console() if Console().is_terminal else Console(width=120)
    rollout, out = recorded(config), Path(config.out)
    episodes, left_out = episodes_with_phases(config)
    task = rollout.spec
    rows, failed = funnels.funnel(task, episodes), funnels.failures(task, episodes)
    console.print(funnels.table(rows))
    out.mkdir(parents=True, exist_ok=True)
    notes = [f"{left_out} episodes hold no phases and are left out."] if left_out else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown, errors = 0, None
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        if failed and config.failures:
            first = {f.seed for f in failed[: config.failures]}
            again = [e for e in episodes if e.seed in first]
            tiles, told = show_failures(config, rollout, again, progress)
            notes += told
            if tiles:
                contact_sheet(tiles, out / SHEET, columns=_width(rollout), count=len(tiles))
            shown = len(tiles) // _width(rollout)
        if config.paths:
            errors = by_phase(config, rollout, progress)
    if errors:
        console.print(errors.table())
    found = {
        "rollout": rollout.identity() | {"folder": config.folder},
        "phases": [row.content() for row in rows],
        "failures": [asdict(f) for f in failed],
        "open_loop": errors.content() if errors else None,
        "notes": notes,
    }
    results.write_json(out / DIAGNOSIS, found)
    results.write_text(
        out / REPORT, report(config, rollout, (rows, failed), (errors, shown, notes))
    )
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"Report, pictures and numbers: {out}", soft_wrap=True)
    return found


def recorded(config: DiagnoseConfig) -> RolloutConfig:
    """The folder's rollout. Raises UserError where it is none, or its policy is not there."""
    folder = Path(config.folder)
    if not (folder / results.CONFIG).is_file() or not (folder / results.EPISODES).is_file():
        raise UserError(f"folder={folder}: holds no rollout; give one of eval/simpler_rollout.py")
    with user_errors():
        held = read_json(folder / results.CONFIG)
        finished = (folder / results.SUMMARY).is_file()
        summary = read_json(folder / results.SUMMARY) if finished else {}
    where = config.checkpoint or summary.get("checkpoint_folder")
    if held.get("policy") == "checkpoint" and where is None:
        raise UserError(f"folder={folder}: is not finished; give checkpoint=, its policy's folder")
    known = asdict(compose(RolloutConfig, "rollout", [])) | held
    known |= {"checkpoint": where, "workers": 1, "videos": 0}
    rollout = typed(RolloutConfig, OmegaConf.create(known))
    now = rollout.identity()
    if _weights(now) != _weights(held):
        raise UserError(f"checkpoint={where}: has other weights than the rollout's; give its own")
    return rollout


def episodes_with_phases(config: DiagnoseConfig) -> tuple[list[Episode], int]:
    """Those whose phases were noted, and how many were not. Raises UserError if none was."""
    folder = Path(config.folder)
    episodes = results.read_episodes(folder)
    known = [e for e in episodes if e.nearest is not None]
    if not known:
        raise UserError(
            f"folder={folder}: no episode in it holds its phases, which older rollouts did not "
            "note; roll out again with another out"
        )
    return sorted(known, key=lambda e: e.seed), len(episodes) - len(known)


def show_failures(
    config: DiagnoseConfig, rollout: RolloutConfig, episodes: Sequence[Episode], progress: Progress
) -> tuple[list[np.ndarray], list[str]]:
    """Tiles of a contact sheet, a row an episode, and what came of running them again."""
    limiter = Limiter(rollout.limits) if rollout.limits != Limits() else None
    bar = progress.add_task("failures run again", total=len(episodes))
    tiles, notes, repeated = [], [], 0
    env = parts.make_env(rollout)
    try:
        policy = parts.make_policy(rollout, env)
        for episode in episodes:
            again, decisions, last = run_again(env, policy, episode.seed, limiter)
            repeated += same(again, episode)
            failed = funnels.failures(rollout.spec, [again])
            if failed:
                tiles += _row(config, policy, failed[0], decisions, last)
            else:
                notes.append(f"Seed {episode.seed} failed when recorded and succeeds now.")
            progress.advance(bar)
    finally:
        env.close()
    notes.append(
        f"{repeated} of {len(episodes)} failures run again went exactly as recorded"
        + ("." if repeated == len(episodes) else ": the simulator or the policy has changed.")
    )
    return tiles, notes


def by_phase(config: DiagnoseConfig, rollout: RolloutConfig, progress: Progress) -> Section:
    """The open-loop errors of the rollout's policy, as it samples, in whole chunks."""
    from selfflow.policies.flow_policy import load_policy

    how = rollout.decoding | {"ensemble": None, "delay": 0, "execute": None}
    robot = rollout.spec.embodiment
    chunk = load_policy(rollout.run, robot, **how).parts.layout.chunk
    policy = load_policy(rollout.run, robot, config.seed, **how | {"execute": chunk})
    held = [
        (source, episodes_of(source, rollout.spec, config.demonstrations))
        for source in open_sources(config.paths)[0]
    ]
    errors = open_loop(policy, chunk, held, rollout.spec, progress)
    return section(errors, rollout.spec, config.bootstrap, config.seed)


def report(
    config: DiagnoseConfig,
    rollout: RolloutConfig,
    funnel: tuple[list[funnels.Step], list[Failure]],
    more: tuple[Section | None, int, list[str]],
) -> str:
    """The page, in markdown."""
    (rows, failed), (errors, shown, notes) = funnel, more
    who = str(rollout.run) if rollout.policy == "checkpoint" else rollout.policy
    lines = [
        f"# What loses the episodes of {config.folder}",
        "",
        f"{rollout.spec.name}, backend {rollout.backend}, placement {rollout.placement}, policy "
        f"{who}: {rows[-1].through} of {rows[0].n} episodes succeed at the last step.",
        "",
        "## Phases",
        "",
        funnels.markdown(funnels.COLUMNS, [row.cells() for row in rows]),
        "Rates with Wilson's 95 % intervals. An episode passes a phase by reaching it, or a later "
        "one of the same thing, or by succeeding. `at step`: median of those that reached it; "
        "`missed by`: median of those lost there, at their nearest.",
        "",
    ]
    if failed:
        table = funnels.markdown(funnels.FAILURE_COLUMNS, [f.cells() for f in failed])
        lines += ["## Failures", "", table]
    if shown:
        lines += [f"![failures]({SHEET})", "", _legend(config, rollout), ""]
    lines += [errors.markdown()] if errors else []
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def _legend(config: DiagnoseConfig, rollout: RolloutConfig) -> str:
    seen = "A row a failure: the start, where its phase was nearest to being reached, the end"
    if rollout.policy != "checkpoint":
        return seen + "."
    return (
        f"{seen}; then, in that middle picture, how much the decision changes when a part is "
        "covered in the picture's mean colour, red where most, each panel on its own scale: "
        f"{', '.join(KINDS)}. Norms, mean over the decision's actions and draws of the noise "
        f"({config.draws}), which is the same with and without the cover."
    )


def _row(
    config: DiagnoseConfig,
    policy: Policy,
    failure: Failure,
    decisions: list[tuple[int, Observation]],
    last: Observation,
) -> list[np.ndarray]:
    """An episode's tiles: start, the moment, end, and for a checkpoint a heat map a kind."""
    index = max(i for i, (step, _) in enumerate(decisions) if step <= failure.step)
    step, moment = decisions[index]
    camera = next(iter(moment["images"]))
    pictures = [decisions[0][1]["images"][camera], moment["images"][camera], last["images"][camera]]
    told = [f"seed {failure.seed}", f"lost: {failure.phase}", failure.reason]
    steps = [0, step, failure.steps]
    if isinstance(policy, ChunkPolicy):
        earlier = _needed(policy, decisions[: index + 1])
        parts_ = config.rows, config.columns
        draws = range(config.seed, config.seed + config.draws)
        heats = [saliency(decider(policy, earlier, s), moment, camera, *parts_) for s in draws]
        for kind, heat in zip(KINDS, np.mean(heats, axis=0), strict=True):
            pictures.append(overlaid(moment["images"][camera], heat))
            told.append(f"change of {kind}: up to {_amount(kind, float(heat.max()))}")
            steps.append(step)
    tiles = zip(pictures, told, steps, strict=True)
    return [thumbnail(captioned(image, text, at, False)) for image, text, at in tiles]


def _needed(policy: ChunkPolicy, decisions: list[tuple[int, Observation]]) -> list[Observation]:
    """What the policy must have been shown before the last of these decisions: its history."""
    layout, now = policy.parts.layout, decisions[-1][0]
    if layout.context == 1:
        return []
    oldest = now + layout.frame_offsets[0] - policy.execute
    return [seen for step, seen in decisions[:-1] if step >= oldest]


def _amount(kind: str, value: float) -> str:
    if kind == "position":
        return f"{1000 * value:.1f} mm"
    return f"{value:.3f} rad" if kind == "rotation" else f"{100 * value:.0f} %"


def _width(rollout: RolloutConfig) -> int:
    return 3 + len(KINDS) if rollout.policy == "checkpoint" else 3


def _weights(identity: dict[str, Any]) -> str:
    """What tells a checkpoint's weights; its folder may have been renamed."""
    return str(identity.get("checkpoint")).partition(" ")[2]


if __name__ == "__main__":
    launch(DiagnoseConfig, main, "diagnose", check)
