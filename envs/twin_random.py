"""Domain randomisation of the twin: what may differ from the nominal model, by how much, by name.

`draw` takes every number from the episode's generator, `apply` edits the compiled model's arrays by
them, and `Nominal` puts these back; so an episode is fixed by its seed, or by its recorded draws.
Places of robot and things are drawn elsewhere (envs/tasks.py).
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import mujoco
import numpy as np

from selfflow.datasets.rotations import compose, from_axis_angle, rotate
from selfflow.datasets.spec import UserError
from selfflow.envs.table_objects import MODELS
from selfflow.envs.twin_body import ARM_JOINTS
from selfflow.envs.twin_room import FLOORS, TOPS


@dataclass(frozen=True)
class Randomise:
    """How far an episode may be from the nominal model. 0 leaves a thing as it is and draws nothing.

    A factor `exp(u)` is drawn with u uniform in ± the value.
    """  # noqa: E501

    camera_shift: float = 0.0  # m, along each axis
    camera_turn: float = 0.0  # rad, about each axis
    light: float = 0.0  # factor of the lamps' and of the ambient light; rad of the sun's direction
    colour: float = 0.0  # factor of each channel of each surface; of task objects a third of it
    patterns: bool = False  # another floor and another table top or cabinet body
    friction: float = 0.0  # factor of all contacts'; of the drawers' friction and damping
    mass: float = 0.0  # factor of the free things'
    gain: float = 0.0  # factor of the arm's stiffness and damping
    latency: int = 0  # substeps of 2 ms, at most, by which a command reaches the motors late


LEVELS = {
    "none": Randomise(),
    "mild": Randomise(
        camera_shift=0.01, camera_turn=0.015, light=0.2, colour=0.1, friction=0.15, mass=0.2,
        gain=0.05, latency=10,
    ),
    "wide": Randomise(
        camera_shift=0.03, camera_turn=0.04, light=0.45, colour=0.35, patterns=True, friction=0.3,
        mass=0.5, gain=0.15, latency=40,
    ),
}  # fmt: skip
OBJECT_SHARE = 1 / 3  # of the colours' range; a coke can stays red
DRAWN_COLOUR = "colour_{}_{}"
# Materials by the surface that they are on, where that is not their name.
_SURFACES = {"floor": FLOORS, "top": TOPS, "baked_sponge_v2": ("foam", "scrub")}
SHARED = {material: surface for surface, shown in _SURFACES.items() for material in shown}
PARTS = "_parts"  # a thing's rest, that its material is not on

# What `apply` and the table's reset edit.
_FIELDS = (
    "actuator_biasprm", "actuator_gainprm", "body_conaffinity", "body_contype", "body_gravcomp",
    "body_inertia", "body_invweight0", "body_mass", "body_subtreemass", "cam_pos", "cam_quat",
    "dof_damping", "dof_frictionloss", "dof_invweight0", "geom_conaffinity", "geom_contype",
    "geom_friction", "geom_matid", "geom_rgba", "light_diffuse", "light_dir", "mat_rgba",
)  # fmt: skip


def level(randomise: str | Randomise) -> Randomise:
    """The level of that name, or what is given itself. Raises UserError."""
    if isinstance(randomise, Randomise):
        return randomise
    if randomise not in LEVELS:
        raise UserError(f"randomise={randomise}: choose one of {', '.join(LEVELS)}")
    return LEVELS[randomise]


class Nominal:
    """A compiled model's arrays as they are now, to be put back before every episode."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._arrays = [(array, array.copy()) for array in self._edited()]

    def restore(self) -> None:
        """The model is as it was compiled."""
        for array, value in self._arrays:
            array[...] = value

    def _edited(self) -> list[np.ndarray]:
        lamp = self._model.vis.headlight
        return [getattr(self._model, name) for name in _FIELDS] + [lamp.ambient, lamp.diffuse]


def draw(spec: Randomise, model: mujoco.MjModel, rng: np.random.Generator) -> dict[str, float]:
    """Every draw by name; what `spec` leaves alone is not drawn."""
    drawn: dict[str, float] = {}
    for name, extent in _extents(spec, model).items():
        if extent:
            drawn[name] = float(rng.uniform(-extent, extent))
    if spec.patterns:
        drawn["pattern_floor"] = float(rng.integers(len(FLOORS)))
        drawn["pattern_top"] = float(rng.integers(len(TOPS)))
    if spec.latency:
        drawn["latency"] = float(rng.integers(spec.latency + 1))
    return drawn


def _extents(spec: Randomise, model: mujoco.MjModel) -> dict[str, float]:
    """Half the range of every draw that is uniform about 0, by name."""
    extents = {f"camera_{axis}": spec.camera_shift for axis in "xyz"}
    extents |= {f"camera_turn_{axis}": spec.camera_turn for axis in "xyz"}
    extents |= {f"light_{what}": spec.light for what in ("lamps", "ambient", "turn", "tilt")}
    for surface in _surfaces(model):
        share = OBJECT_SHARE if surface.removesuffix(PARTS) in (*MODELS, "apple") else 1.0
        extents |= {DRAWN_COLOUR.format(surface, c): share * spec.colour for c in "rgb"}
    if _drawer_dofs(model):
        extents["drawer_friction"] = spec.friction
    return extents | {"friction": spec.friction, "mass": spec.mass, "gain": spec.gain}


def apply(model: mujoco.MjModel, drawn: dict[str, float]) -> None:
    """Edits the nominal model by an episode's draws; names that are not of `draw` are left out."""
    got = {name: drawn.get(name, 0.0) for name in _extents(Randomise(), model)}
    shift = [got[f"camera_{axis}"] for axis in "xyz"]
    turn = [got[f"camera_turn_{axis}"] for axis in "xyz"]
    model.cam_pos += shift
    model.cam_quat[:] = [compose(q, from_axis_angle(turn)) for q in model.cam_quat]
    _light(model, got)
    for surface, (array, rows) in _surfaces(model).items():
        factor = np.exp([got[DRAWN_COLOUR.format(surface, c)] for c in "rgb"])
        array[rows, :3] = np.minimum(array[rows, :3] * factor, 1 if array is model.geom_rgba else 2)
    _patterns(model, drawn)
    model.geom_friction *= np.exp(got["friction"])
    for dof in _drawer_dofs(model):
        model.dof_damping[dof] *= np.exp(got["drawer_friction"])
        model.dof_frictionloss[dof] *= np.exp(got["drawer_friction"])
    _weigh(model, float(np.exp(got["mass"])))
    for joint in ARM_JOINTS:
        actuator = model.actuator(joint).id
        model.actuator_gainprm[actuator] *= np.exp(got["gain"])
        model.actuator_biasprm[actuator] *= np.exp(got["gain"])


def _light(model: mujoco.MjModel, got: dict[str, float]) -> None:
    lamp = model.vis.headlight
    model.light_diffuse *= np.exp(got["light_lamps"])
    lamp.diffuse[:] = lamp.diffuse * np.exp(got["light_ambient"])
    lamp.ambient[:] = lamp.ambient * np.exp(got["light_ambient"])
    turn = from_axis_angle([got["light_tilt"], 0.0, got["light_turn"]])
    model.light_dir[:] = [rotate(turn, direction) for direction in model.light_dir]


def _surfaces(model: mujoco.MjModel) -> dict[str, tuple[np.ndarray, list[int]]]:
    """What has one colour draw, with the array and rows that hold its colours: the materials, and
    what is seen without one, by the body that stands in the world."""
    found: dict[str, tuple[np.ndarray, list[int]]] = {}
    for material in range(model.nmat):
        name = str(model.material(material).name)
        found.setdefault(SHARED.get(name, name), (model.mat_rgba, []))[1].append(material)
    plain = (model.geom_matid < 0) & (model.geom_rgba[:, 3] > 0)
    for geom in np.flatnonzero(plain).tolist():
        body = model.body(model.body_rootid[model.geom_bodyid[geom]]).name
        name = (model.geom(geom).name or "room") if body == "world" else body
        name += PARTS if name in found and found[name][0] is model.mat_rgba else ""
        found.setdefault(name, (model.geom_rgba, []))[1].append(geom)
    return found


def _patterns(model: mujoco.MjModel, drawn: dict[str, float]) -> None:
    for key, choices in (("pattern_floor", FLOORS), ("pattern_top", TOPS)):
        if key in drawn:
            shown = model.material(choices[0]).id
            other = model.material(choices[round(drawn[key])]).id
            model.geom_matid[model.geom_matid == shown] = other


def _drawer_dofs(model: mujoco.MjModel) -> list[int]:
    slides = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE).tolist()
    return [int(model.jnt_dofadr[j]) for j in slides if model.joint(j).name.startswith("drawer_")]


def _weigh(model: mujoco.MjModel, factor: float) -> None:
    """Scales the free bodies' masses, with what the compiler has derived from them."""
    for joint in np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE):
        body, dof = model.jnt_bodyid[joint], model.jnt_dofadr[joint]
        model.body_subtreemass[0] += (factor - 1) * model.body_mass[body]
        model.body_subtreemass[body] *= factor
        model.body_mass[body] *= factor
        model.body_inertia[body] *= factor
        model.body_invweight0[body] /= factor
        model.dof_invweight0[dof : dof + 6] /= factor
