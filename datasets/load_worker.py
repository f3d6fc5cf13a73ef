"""The process that loads batches for another one; loading.py starts it and says what it does."""

import json
import os
import sys
from typing import IO, Any

from selfflow.datasets.augment import Augment
from selfflow.datasets.loading import amounts, send, send_error
from selfflow.datasets.source import open_sources
from selfflow.datasets.spec import UserError
from selfflow.datasets.windows import Loader, Place, WindowSpec


def main() -> None:
    """Answers every line of standard input on what was standard output, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what readers print goes where errors go
    try:
        work(answers)
    except BrokenPipeError:  # the run has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())


def work(answers: IO[bytes]) -> None:
    """Opens what the first line names, then loads what the others ask for."""
    about = json.loads(sys.stdin.readline())
    loader = None
    for line in sys.stdin:
        try:
            loader = loader or opened(about)
            send(answers, loader.load([Place(*place) for place in json.loads(line)]))
        except UserError as e:
            send_error(answers, e)


def opened(about: dict[str, Any]) -> Loader:
    """The loader. Raises UserError if the data are no longer what the run opened."""
    sources = open_sources(about["data"])[0]
    if (found := amounts(sources)) != about["amounts"]:
        raise UserError(f"data: changed while training: {found}, not {about['amounts']}")
    return Loader(sources, window_spec(about["spec"]), about["seed"])


def window_spec(values: dict[str, Any]) -> WindowSpec:
    """Inverse of dataclasses.asdict and JSON."""
    shapes = {k: (int(rows), int(width)) for k, (rows, width) in values["extra"].items()}
    augment = Augment(**values["augment"])
    whole = {"frames": tuple(values["frames"]), "extra": shapes, "augment": augment}
    return WindowSpec(**values | whole)


if __name__ == "__main__":
    main()
