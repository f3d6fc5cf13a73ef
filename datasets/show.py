"""python datasets/show.py source=data/open_drawer_place episode=3

What is in a data set: a table of features, lengths and instructions; with `episode=3` a film with
the curves of the actions, in rerun or as mp4; with `web=true` a page of thumbnails in the browser.
Every key is explained in configs/show.yaml.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from selfflow.configs.entry import launch, one_of
from selfflow.datasets.episode_film import write_film
from selfflow.datasets.episode_page import page, serve, write_page
from selfflow.datasets.episode_rerun import has_screen, need_rerun, write_rerun
from selfflow.datasets.episodes import EpisodeSource, check_camera
from selfflow.datasets.features import check_episode, print_features, spread, survey
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError

VIEWERS = ("mp4", "rerun")


@dataclass(frozen=True)
class ShowConfig:
    """Keys are explained in configs/show.yaml."""

    source: str
    episode: int | None = None
    viewer: str | None = None
    cameras: Any = None
    web: Any = None
    port: int = 0
    episodes: int = 200
    out: str = "outputs/show"

    def __post_init__(self) -> None:
        if self.viewer is not None:
            one_of("viewer", self.viewer, VIEWERS)
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes}: give at least 1")
        if not (self.web is None or isinstance(self.web, bool) or str(self.web).endswith(".html")):
            raise ValueError(f"web={self.web}: give true, or a path that ends in .html")


def check(config: ShowConfig) -> None:
    """Raises UserError for what can be known before anything is read."""
    if config.viewer == "rerun":
        need_rerun()


def main(config: ShowConfig) -> None:
    """Prints the tables, then shows what was asked for."""
    ((source,), _) = open_sources([config.source])
    if len(source) == 0:
        raise UserError(f"source={config.source}: no episode ({source.skipped} skipped)")
    if config.episode is not None:
        check_episode(source, config.episode)
    cameras = _cameras(config, source)
    console, some = Console(), spread(len(source), config.episodes)
    print_features(console, source, survey(source, some))
    if config.episode is not None:
        console.print(show_episode(config, source, config.episode, cameras), soft_wrap=True)
    if config.web:
        text = page(source, some, cameras)
        if config.web is True:
            serve(text, config.port)
        else:
            write_page(text, Path(config.web).expanduser())
            console.print(f"page: {config.web}", soft_wrap=True)


def show_episode(
    config: ShowConfig, source: EpisodeSource, i: int, cameras: tuple[str, ...]
) -> str:
    """Opens episode i in rerun, or writes a file; says what was done."""
    installed = importlib.util.find_spec("rerun") is not None
    rerun = config.viewer == "rerun" or (config.viewer is None and installed)
    if rerun and has_screen():
        write_rerun(source, i, cameras)
        return f"episode {i} is in rerun's window"
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.name.replace('/', '_')}_{i}"
    if rerun:
        write_rerun(source, i, cameras, folder / f"{name}.rrd")
        return f"no screen here; open it elsewhere: rerun {folder / name}.rrd"
    write_film(source, i, cameras, folder / f"{name}.mp4")
    return f"film: {folder / name}.mp4"


def _cameras(config: ShowConfig, source: EpisodeSource) -> tuple[str, ...]:
    given = [config.cameras] if isinstance(config.cameras, str) else config.cameras
    names = tuple(map(str, given or source.cameras))
    for name in names:
        check_camera(name, source.cameras, source.name)
    return names


if __name__ == "__main__":
    launch(ShowConfig, main, "show", check=check)
