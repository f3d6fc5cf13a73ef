"""Collision hulls as PhysX 4 cooked them, where PhysX 5 cooks them otherwise.

PhysX 4 takes hull vertices that lie almost in a plane as the corners of one face, whose plane is
Newell's; PhysX 5 keeps the facets apart. The coke can's bottom has ten corners, three of them 0.2
to 0.5 mm higher: in SIMPLER it stands on all ten, leaning by 0.38 degrees (the recorded lean is
0.375), and with PhysX 5's facets upright. Metres, in the model's frame.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

FLATTENED = ("opened_coke_can",)  # models whose rest the original's recordings show
SLACK = 1e-3  # m above the lowest corner


def flat_hull(path: Path, density: float) -> Any:
    """SAPIEN's convex shape of an OBJ file, its bottom one face; friction as all objects'."""
    import sapien

    vertices = flat_bottom(read_vertices(path)).astype(np.float32)
    material = sapien.physx.PhysxMaterial(0.5, 0.5, 0.0)
    shape = sapien.physx.PhysxCollisionShapeConvexMesh(vertices, [1.0, 1.0, 1.0], material)
    shape.density = density
    return shape


def read_vertices(path: Path) -> Float[np.ndarray, "n 3"]:
    """The vertices of an OBJ file."""
    rows = (line.split() for line in path.read_text().splitlines())
    return np.array([[float(x) for x in row[1:4]] for row in rows if row[:1] == ["v"]])


def flat_bottom(vertices: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """The vertices, those within SLACK of the lowest (along -y) moved into their Newell plane."""
    low = vertices[:, 1] < vertices[:, 1].min() + SLACK
    centre = vertices[low].mean(axis=0)
    corners = vertices[low] - centre
    around = corners[np.argsort(np.arctan2(corners[:, 2], corners[:, 0]))]
    normal = np.cross(around, np.roll(around, -1, axis=0)).sum(axis=0)
    normal /= np.linalg.norm(normal)
    moved = vertices.copy()
    moved[low] -= np.outer(corners @ normal, normal)
    return moved
