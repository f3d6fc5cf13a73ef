"""python eval/simpler_rollout.py task=open_drawer_place   (10 episodes in the twin, some minutes)

Rolls a policy out in closed loop and says how often it succeeds. Longer, in the real scene:

    python eval/simpler_rollout.py task=open_drawer_place checkpoint=outputs/finetune \
        backend=simpler episodes=50 seed=200000 workers=2 out=outputs/simpler50

or all of SIMPLER's evaluation, a folder a variant, with a list of what could not be run:

    python eval/simpler_rollout.py eval=simpler_visual_matching workers=2 out=outputs/matching

Writes to `out`: episodes.jsonl (a line an episode), summary.json, an mp4 of each of the first
`videos` episodes and a contact sheet of the first. The same command with the same `out` continues
where it stopped. Seeds from 200000 are for reported numbers: open them once per checkpoint.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from selfflow.configs.entry import launch
from selfflow.envs.simpler_variants import MATCHED
from selfflow.eval import parts, results, suite
from selfflow.eval.grids import photos
from selfflow.eval.parts import RolloutConfig
from selfflow.eval.report import summarize, table
from selfflow.eval.rollout import Episode
from selfflow.eval.workers import Message, Ready, Stepped, run_seeds
from selfflow.worldmodel.checkpoint import resolve


def check(config: RolloutConfig) -> None:
    """Everything that can be wrong before work begins."""
    if config.suite:
        return suite.check(config)
    parts.check(config)
    results.check_folder(Path(config.out), config.identity())


def main(config: RolloutConfig) -> dict[str, Any]:
    """Runs what is still missing in `out`; returns the summary that it writes there."""
    try:
        return suite.run(config, one_rollout) if config.suite else one_rollout(config)
    except KeyboardInterrupt:
        print(f"stopped; continue with the same command and out={config.out}")
        raise


def one_rollout(config: RolloutConfig) -> dict[str, Any]:
    """One task's episodes; returns their summary."""
    folder, identity = Path(config.out), config.identity()
    done = {e.seed: e for e in results.read_episodes(folder) if e.seed in config.seeds}
    missing = [seed for seed in config.seeds if seed not in done]
    console = Console() if Console().is_terminal else Console(width=120)
    if done:
        console.print(f"{folder} holds {len(done)} of {config.episodes} episodes; continuing")
    opened = False

    def report(message: Message) -> None:
        nonlocal opened
        if isinstance(message, Ready) and not opened:
            results.open_folder(folder, identity)
            opened = True
        elif isinstance(message, Episode):
            results.append_episode(folder, message)
            done[message.seed] = message
        display.update(message)

    with Display(config, console, done) as display:
        if missing:
            run_seeds(config, missing, folder, report)
    results.write_episodes(folder, results.read_episodes(folder))  # in the order of seeds
    summary = identity | {"version": version("selfflow"), "folder": str(folder)}
    if config.policy == "checkpoint":
        summary["checkpoint_folder"] = str(config.run)
        summary["photographs_seen"] = photographs_seen(config)
    summary |= summarize([done[seed] for seed in config.seeds])
    results.write_json(folder / results.SUMMARY, summary)
    console.print(table([summary]))
    console.print(f"Episodes, summary and videos: {folder}", soft_wrap=True)
    return summary


def photographs_seen(config: RolloutConfig) -> list[str]:
    """Those behind the task that the policy's training data have shown, by its checkpoint."""
    if config.backend != "simpler" or config.variant != MATCHED:
        return []
    shown = json.loads((resolve(config.run) / "config.json").read_text()).get("photographs", [])
    return sorted(set(shown) & set(photos(config.spec.name)))


class Display:
    """A live progress line on a terminal, else one plain line an episode."""

    def __init__(self, config: RolloutConfig, console: Console, done: dict[int, Episode]) -> None:
        self._done = done  # grows outside
        self._config, self._console = config, console
        self._progress = Progress(
            TextColumn(f"[bold]{config.spec.name}"),
            BarColumn(bar_width=8),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(
            "starting", total=config.episodes * config.spec.max_steps
        )

    def __enter__(self) -> "Display":
        self._progress.start()
        self._steps: dict[int, int] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, message: Message) -> None:
        """Shows a message of run_seeds."""
        if isinstance(message, Episode):
            self._steps.pop(message.seed, None)
            if not self._console.is_terminal:
                self._console.print(self._line(message), highlight=False, soft_wrap=True)
        elif isinstance(message, Stepped):
            self._steps[message.seed] = message.step
            number = len(self._done) + 1
            self._progress.update(
                self._bar,
                completed=len(self._done) * self._config.spec.max_steps + sum(self._steps.values()),
                description=f"{number}/{self._config.episodes} step {message.step:<3} "
                f"success {self._so_far()} {message.latency:.3f} s a decision",
            )

    def _so_far(self) -> str:
        return f"{sum(e.success for e in self._done.values())}/{len(self._done)}"

    def _line(self, episode: Episode) -> str:
        outcome = "success" if episode.success else "failure"
        mean = sum(episode.latencies) / max(1, len(episode.latencies))
        return (
            f"{self._config.spec.name}  episode {len(self._done)}/{self._config.episodes}  "
            f"seed {episode.seed}  {outcome} after {episode.steps} steps ({episode.reason})  "
            f"success so far {self._so_far()}  {mean:.3f} s a decision"
        )


if __name__ == "__main__":
    launch(RolloutConfig, main, "rollout", check)
