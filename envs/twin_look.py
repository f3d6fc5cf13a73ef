"""How the twin's scene is drawn, as a config: no MuJoCo here, so that commands can read it."""

from dataclasses import dataclass

from selfflow.datasets.spec import UserError

ROOMS = ("plain", "office")
MOST = {"shadows": 8192, "samples": 32}  # beyond which no OpenGL goes
MOST_SIDE = 4096  # pixels of a picture's


@dataclass(frozen=True)
class Look:
    """The defaults are what the bundled policy was trained on. Raises UserError."""

    room: str = "office"  # one of ROOMS
    shadows: int = 512  # side of the shadow map in pixels; 0 draws none
    samples: int = 0  # a pixel, of multisampling

    def __post_init__(self) -> None:
        if self.room not in ROOMS:
            raise UserError(f"look.room={self.room}: choose one of {', '.join(ROOMS)}")
        for key, most in MOST.items():
            if not 0 <= getattr(self, key) <= most:
                raise UserError(f"look.{key}={getattr(self, key)}: must be between 0 and {most}")


USUAL = Look()
