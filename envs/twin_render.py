"""Pictures of the MuJoCo twin: OpenGL off screen where there is any, else rays on the CPU.

`make_renderer` takes what works, in the order EGL, OSMesa, rays; SELFFLOW_RENDERER chooses one.
The ray renderer needs no graphics library at all: flat colours, Lambert shading, one shadow ray.
"""

# mujoco's names live in binary modules without stubs.
# pyright: reportAttributeAccessIssue=false

import ctypes.util
import multiprocessing
import os
import sys
from typing import Any, Protocol, runtime_checkable

import mujoco
import numpy as np
from jaxtyping import Bool, Float, UInt8

from selfflow.datasets.spec import UserError

LIBRARIES = {"egl": ("EGL", "GL"), "osmesa": ("OSMesa",)}
OPENED_BY: set[int] = set()  # which have drawn with OpenGL, of this process and its ancestors
Frame = UInt8[np.ndarray, "H W 3"]


@runtime_checkable
class Renderer(Protocol):
    kind: str

    def render(self, data: mujoco.MjData, camera: str) -> Frame:
        """The camera's picture, uint8 RGB."""
        ...

    def share(
        self, data: mujoco.MjData, camera: str, geoms: Bool[np.ndarray, "G"]
    ) -> Float[np.ndarray, "H W"]:
        """How much of each pixel shows one of these geoms of the model, 0 .. 1."""
        ...

    def close(self) -> None: ...


class GLRenderer:
    """MuJoCo's rasteriser in an off-screen context. Holds the context until `close`."""

    def __init__(self, model: mujoco.MjModel, height: int, width: int, kind: str) -> None:
        if kind == "egl":
            from mujoco.egl import GLContext
        else:
            from mujoco.osmesa import GLContext
        self.kind, self._model = kind, model
        # Drawn at up to twice the size and averaged: smoother than multisampling and much cheaper.
        self._factor = 2 if height <= 256 and width <= 320 else 1
        self._rect = mujoco.MjrRect(0, 0, width * self._factor, height * self._factor)
        self._gl: Any = GLContext(self._rect.width, self._rect.height)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=500)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._pixels = np.empty((self._rect.height, self._rect.width, 3), np.uint8)

    def render(self, data: mujoco.MjData, camera: str) -> Frame:
        image = self._draw(data, camera)
        if self._factor == 1:
            return image.copy()
        quarters = [image[i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
        return ((sum(quarters) + 2) >> 2).astype(np.uint8)

    def share(
        self, data: mujoco.MjData, camera: str, geoms: Bool[np.ndarray, "G"]
    ) -> Float[np.ndarray, "H W"]:
        flags = self._scene.flags
        wanted = [int(mujoco.mjtRndFlag.mjRND_SEGMENT), int(mujoco.mjtRndFlag.mjRND_IDCOLOR)]
        flags[wanted] = 1
        colours = self._draw(data, camera).astype(np.int64)
        flags[wanted] = 0
        numbers = colours @ (1, 1 << 8, 1 << 16)  # 0 is nothing
        shown = np.zeros(self._scene.ngeom + 1, bool)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid >= 0:
                shown[geom.segid + 1] = geoms[geom.objid]
        f = self._factor
        return shown[numbers].reshape(len(colours) // f, f, -1, f).mean((1, 3))

    def _draw(self, data: mujoco.MjData, camera: str) -> Frame:
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._options,
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        return self._pixels[::-1]

    def close(self) -> None:
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


class RayRenderer:
    """One ray a pixel with `mj_multiRay`, and one towards the light. Needs no OpenGL."""

    kind = "ray"
    AMBIENT, DIFFUSE, SKY = 0.45, 0.55, (0.72, 0.78, 0.84)
    LIGHT_DISTANCE = 6.0  # m; the directional light as a far point
    SLACK = 0.005  # m by which a shadow ray may fall short of its point

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        self._model, self._height, self._width = model, height, width

    def render(self, data: mujoco.MjData, camera: str) -> Frame:
        origin, rays = self._rays(data, camera)
        geoms, distances, normals = self._cast(data, origin, rays)
        hits = origin + rays * np.maximum(distances, 0)[:, None]
        towards = -self._model.light_dir[0] / np.linalg.norm(self._model.light_dir[0])
        light = towards * self.LIGHT_DISTANCE
        spokes = hits - light
        reach = np.linalg.norm(spokes, axis=1)
        _, lit, _ = self._cast(data, light, spokes / reach[:, None])
        facing = np.clip(np.sum(normals * towards, axis=1), 0, 1) * (lit > reach - self.SLACK)
        shade = np.where(geoms < 0, 1.0, self.AMBIENT + self.DIFFUSE * facing)
        image = self._colours()[geoms] * shade[:, None]
        return (255 * np.clip(image, 0, 1)).astype(np.uint8).reshape(self._height, self._width, 3)

    def share(
        self, data: mujoco.MjData, camera: str, geoms: Bool[np.ndarray, "G"]
    ) -> Float[np.ndarray, "H W"]:
        hit, _, _ = self._cast(data, *self._rays(data, camera))
        shown = np.append(geoms, False)[hit]  # geom -1 is the sky
        return shown.reshape(self._height, self._width).astype(np.float64)

    def _rays(self, data: mujoco.MjData, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """The camera's place, and a direction a pixel."""
        cam = self._model.camera(camera).id
        origin, turn = data.cam_xpos[cam].copy(), data.cam_xmat[cam].reshape(3, 3)
        focal = self._height / 2 / np.tan(np.radians(self._model.cam_fovy[cam]) / 2)
        x = (np.arange(self._width) + 0.5 - self._width / 2) / focal
        y = (self._height / 2 - np.arange(self._height) - 0.5) / focal
        grid = np.stack([*np.meshgrid(x, y), np.full((self._height, self._width), -1.0)], axis=-1)
        rays = grid.reshape(-1, 3) @ turn.T
        return origin, rays / np.linalg.norm(rays, axis=1, keepdims=True)

    def _colours(self) -> np.ndarray:
        """RGB by geom, of a textured one its texture's mean; the last, geom -1, is the sky."""
        model = self._model
        colours = model.geom_rgba[:, :3].copy()
        for material in np.unique(model.geom_matid[model.geom_matid >= 0]):
            texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
            start = model.tex_adr[texture]
            size = model.tex_width[texture] * model.tex_height[texture] * 3
            mean = model.tex_data[start : start + size].reshape(-1, 3).mean(0) / 255
            colours[model.geom_matid == material] = mean * model.mat_rgba[material, :3]
        return np.vstack([colours, self.SKY])

    def _cast(self, data, origin, rays):  # -> geom ids, distances, normals
        n = len(rays)
        geoms, distances = np.empty(n, np.int32), np.empty(n)
        normals = np.empty(3 * n)
        mujoco.mj_multiRay(
            self._model,
            data,
            origin,
            rays.ravel(),
            None,
            True,
            -1,
            geoms,
            distances,
            normals,
            n,
            20.0,
        )
        return geoms, distances, normals.reshape(n, 3)

    def close(self) -> None:
        pass


def asked_renderer() -> str:
    """The value of SELFFLOW_RENDERER, "" where it is not set. Raises UserError."""
    # not MUJOCO_GL: mujoco refuses at import what it does not know, such as "ray"
    asked = os.environ.get("SELFFLOW_RENDERER", "")
    if asked not in ("", "ray", *LIBRARIES):
        raise UserError(f"SELFFLOW_RENDERER={asked}: choose egl, osmesa or ray, or leave it unset")
    return asked


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> Renderer:
    """The best renderer that works here; says so in one line where it is the ray renderer."""
    asked = asked_renderer()
    if asked != "ray" and OPENED_BY - {os.getpid()}:
        raise UserError(
            "this process was forked after its parent had drawn with OpenGL, and would hang: start "
            "it with context='spawn', or before the parent's first picture"
        )
    if asked == "ray":
        return RayRenderer(model, height, width)
    if multiprocessing.parent_process() is not None:
        # One of several that draw at once. llvmpipe (OpenGL on the CPU) would start a thread a core
        # in each of them; without, its pictures are the same and cost as much processor time.
        os.environ.setdefault("LP_NUM_THREADS", "0")
    tried = []
    for kind in [asked] if asked else LIBRARIES:
        if all(ctypes.util.find_library(name) for name in LIBRARIES[kind]):
            try:
                renderer = GLRenderer(model, height, width, kind)
                OPENED_BY.add(os.getpid())
                return renderer
            except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as e:
                tried.append(f"{kind}: {e}")
    reason = "; ".join(tried) or "no libEGL + libGL and no libOSMesa"
    print(
        f"no OpenGL here ({reason}): drawing with CPU rays, flat colours "
        "(cure: apt-get install --no-install-recommends libegl1 libgl1)",
        file=sys.stderr,
    )
    return RayRenderer(model, height, width)
