"""Placing SIMPLER's files: sums, tables, stand-ins, git; and what the doctor says of a machine."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from selfflow.configs.entry import compose
from selfflow.datasets.spec import UserError
from selfflow.envs import doctor, simpler_assets, simpler_standins, vulkan
from selfflow.envs.simpler_assets import AssetsConfig, State
from selfflow.envs.simpler_standins import glb, read_obj, scaled

SHARED = Path(__file__).parents[2] / "shared" / "simpler_assets"
TABLE, PLAIN = "data/custom/info_x.json", "data/custom/mk.urdf"
ORIGINAL = f"{simpler_assets.ORIGINALS}/info_x.json"
ROOM = "data/hab2_bench_assets/stages/bridge_table_1_v1.glb"
EGGPLANT = "data/custom/models/eggplant/textured.glb"
REDBULL = "data/custom/models/baked_opened_redbull_can_v2/textured.glb"
FULL = json.dumps({"apple": {"density": 1}, "pear": {}}).encode()
OBJ = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 2\nf 1/1 2/2 3/3 4/4\n"


def total(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def upstream(tmp_path, monkeypatch) -> Path:
    """A small clone, and a manifest of what should become of it."""
    known = {
        "repository": "owner/name",
        "commit": "0" * 40,
        "files": {
            PLAIN: total(b"<robot/>"),
            ORIGINAL: total(FULL),
            TABLE: total(b'{\n    "apple": {\n        "density": 1\n    }\n}'),
        },
        "tables": {TABLE: ["apple"]},
        "standins": {ROOM: total(b"room"), EGGPLANT: total(b"egg")},
    }
    monkeypatch.setattr(simpler_assets, "MANIFEST", tmp_path / "manifest.json")
    simpler_assets.MANIFEST.write_text(json.dumps(known))
    clone = tmp_path / "clone"
    files = {
        PLAIN: b"<robot/>",
        TABLE: FULL,
        "data/custom/models/eggplant/collision.obj": OBJ.encode(),
    }
    for name, content in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(content)
    return clone


def test_a_clone_becomes_the_set(upstream, tmp_path, capsys):
    config = AssetsConfig(str(upstream), str(tmp_path / "out"))
    simpler_assets.check(config)
    state = simpler_assets.main(config)
    assert state == State((PLAIN, ORIGINAL, TABLE), (ROOM, EGGPLANT), (), ())
    assert (config.root / ORIGINAL).read_bytes() == FULL
    assert json.loads((config.root / TABLE).read_bytes()) == {"apple": {"density": 1}}
    assert not list(config.root.rglob("*.part"))
    assert f"stand-in: {ROOM}" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in config.root.rglob("*")}
    assert simpler_assets.main(config) == state  # nothing is written again
    assert before == {path: path.stat().st_mtime_ns for path in config.root.rglob("*")}


def test_what_is_interrupted_or_damaged_is_completed_and_the_genuine_replaces_a_standin(
    upstream, tmp_path, monkeypatch
):
    config = AssetsConfig(str(upstream), str(tmp_path / "out"))
    simpler_assets.main(config)
    monkeypatch.setenv("SIMPLER_ASSETS", str(config.root))
    assert simpler_assets.present(EGGPLANT)
    assert not simpler_assets.genuine(EGGPLANT)
    assert simpler_assets.genuine("data/custom/mk.*")
    (config.root / PLAIN).write_text("torn")
    (config.root / TABLE).unlink()
    state = simpler_assets.verify(config.root)
    assert (state.missing, state.wrong) == ((TABLE,), (PLAIN,))
    assert "2 missing or changed" in str(state)
    (upstream / EGGPLANT).write_bytes(b"the real mesh")
    state = simpler_assets.main(config)
    assert (state.complete, state.standins) == (True, (ROOM,))
    assert simpler_assets.genuine(EGGPLANT)


def test_another_commit_is_told_and_nothing_of_it_is_placed(upstream, tmp_path):
    (upstream / PLAIN).write_text("changed upstream")
    config = AssetsConfig(str(upstream), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"not all files of commit 0000000 .*mk\.urdf \(missing\)"):
        simpler_assets.main(config)
    assert not (config.root / PLAIN).exists()
    assert (config.root / TABLE).exists()


def test_a_git_address_is_fetched_at_the_pinned_commit(upstream, tmp_path):
    def git(*words: str) -> str:
        command = ["git", "-C", str(upstream), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "pinned")
    known = simpler_assets.manifest() | {"commit": git("rev-parse", "HEAD")}
    simpler_assets.MANIFEST.write_text(json.dumps(known))
    (upstream / PLAIN).write_text("later")
    git("commit", "-q", "-a", "-m", "later")
    config = AssetsConfig(f"file://{upstream}", str(tmp_path / "out"))
    simpler_assets.check(config)
    assert simpler_assets.main(config).complete
    with pytest.raises(UserError, match="git fetch failed"):
        simpler_assets.main(AssetsConfig(f"file://{tmp_path}/none", str(tmp_path / "out")))


def test_wrong_sources_are_one_line(upstream, tmp_path):
    with pytest.raises(UserError, match="no folder with data/ in it; give a clone of owner/name"):
        simpler_assets.check(AssetsConfig(str(tmp_path), None))
    with pytest.raises(UserError, match="source"):
        compose(AssetsConfig, "simpler_assets", [])
    with pytest.raises(UserError, match="is a file"):
        simpler_assets.check(AssetsConfig(str(upstream), str(simpler_assets.MANIFEST)))


def test_the_manifest_is_of_the_shared_set():
    if not SHARED.is_dir():
        pytest.skip(f"no assets at {SHARED}")
    state = simpler_assets.verify(SHARED)
    assert state.complete, str(state)
    assert len(state.standins) == len(simpler_assets.manifest()["standins"]) == 6
    # The tables can be made of the originals.
    for name in simpler_assets.manifest()["tables"]:
        *_, made = simpler_assets._contents(name, SHARED, simpler_assets.manifest())
        assert total(made) == simpler_assets.manifest()["files"][name]


# --- stand-ins ------------------------------------------------------------------------------------


def unpacked(file: bytes) -> tuple[dict, list[tuple[np.ndarray, np.ndarray]]]:
    """The JSON of a glb, and vertices and triangles of each mesh."""
    magic, version, length = struct.unpack_from("<4sII", file)
    assert (magic, version, length) == (b"glTF", 2, len(file))
    size = struct.unpack_from("<I", file, 12)[0]
    content, data = json.loads(file[20 : 20 + size]), file[28 + size :]

    def array(index: int, dtype: str) -> np.ndarray:
        accessor = content["accessors"][index]
        view = content["bufferViews"][accessor["bufferView"]]
        start = view["byteOffset"]
        return np.frombuffer(data[start : start + view["byteLength"]], dtype).reshape(-1, 3)

    shapes = [mesh["primitives"][0] for mesh in content["meshes"]]
    return content, [
        (array(s["attributes"]["POSITION"], "<f4"), array(s["indices"], "<u4")) for s in shapes
    ]


@pytest.mark.parametrize("room", sorted(simpler_standins._ROOMS))
def test_rooms_are_closed_boxes_of_the_documented_heights(room):
    file = simpler_standins.build(f"data/hab2_bench_assets/stages/{room}.glb", Path("nowhere"))
    assert file
    _, ((table, triangles), (floor, _)) = unpacked(file)
    a, b, c = (table[triangles[:, i]].astype(float) for i in range(3))
    volume = np.einsum("ni,ni->", a, np.cross(b, c)) / 6  # positive: faces look outwards
    assert volume == pytest.approx(np.prod(np.ptp(table, axis=0)), rel=1e-5)
    assert table[:, 1].max() == pytest.approx(0.882 if "google" in room else 0.8695)
    assert floor[:, 1].max() == pytest.approx(0.017 if "google" in room else 0.0)
    if SHARED.is_dir():
        given = unpacked((SHARED / f"data/hab2_bench_assets/stages/{room}.glb").read_bytes())[0]
        for i, box in ((1, table), (2, floor)):
            for side, corner in (("min", box.min(0)), ("max", box.max(0))):
                np.testing.assert_allclose(given["accessors"][i][side], corner, atol=1e-6)


def test_the_eggplant_is_its_collision_mesh(tmp_path):
    shape = tmp_path / "data/custom/models/eggplant/collision.obj"
    assert simpler_standins.build(EGGPLANT, tmp_path) is None
    shape.parent.mkdir(parents=True)
    shape.write_text(OBJ)
    file = simpler_standins.build(EGGPLANT, tmp_path)
    assert file
    content, ((vertices, triangles),) = unpacked(file)
    np.testing.assert_array_equal(vertices, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 2]])
    np.testing.assert_array_equal(triangles, [[0, 1, 2], [0, 2, 3]])
    assert content["accessors"][0]["max"] == [1, 1, 2]
    assert read_obj(shape)[1].dtype == np.uint32


def test_the_can_is_the_other_one_squeezed_and_centred(tmp_path):
    assert simpler_standins.build(REDBULL, tmp_path) is None
    other = tmp_path / "data/custom/models/baked_opened_redbull_can_v2_alt/textured.glb"
    other.parent.mkdir(parents=True)
    tall = np.array([[0.0, -0.07, 0.0], [0.01, 0.09, 0.0], [0.0, 0.0, 0.02]])
    other.write_bytes(glb([(tall, np.array([[0, 1, 2]]), (1.0, 0.0, 0.0))]))
    file = simpler_standins.build(REDBULL, tmp_path)
    assert file
    content, ((vertices, _),) = unpacked(file)
    np.testing.assert_allclose(vertices, tall, atol=1e-7)
    (root,) = content["scenes"][0]["nodes"]
    matrix = np.array(content["nodes"][root]["matrix"]).reshape(4, 4).T  # glTF: by columns
    placed = (np.c_[vertices, np.ones(3)] @ matrix.T)[:, 1]
    assert [placed.min(), placed.max()] == pytest.approx([-0.08 * 0.8956, 0.08 * 0.8956])
    with pytest.raises(ValueError, match="not a binary glTF"):
        scaled(b"solid")


@pytest.mark.sim
def test_sapien_loads_standins_as_it_loads_the_shared_ones(tmp_path):
    from selfflow.envs.sapien_render import require_renderer

    if not SHARED.is_dir():
        pytest.skip(f"no assets at {SHARED}")
    try:
        sapien = require_renderer()
    except UserError as e:
        pytest.skip(f"no renderer: {e}")
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
    for name in (ROOM, EGGPLANT):
        mine = tmp_path / Path(name).name
        mine.write_bytes(simpler_standins.build(name, SHARED) or b"")
        boxes = []
        for path in (mine, SHARED / name):
            builder = scene.create_actor_builder()
            builder.add_visual_from_file(str(path))
            builder.add_nonconvex_collision_from_file(str(path))
            body = builder.build_static(name="it").find_component_by_type(
                sapien.physx.PhysxRigidStaticComponent
            )
            boxes.append(np.array(body.compute_global_aabb_tight()))
        np.testing.assert_allclose(boxes[0], boxes[1], atol=1e-6)


# --- the doctor -----------------------------------------------------------------------------------


def examined(monkeypatch, *broken: str) -> tuple[int, str]:
    """Status and text of the doctor on a machine where all but `broken` works."""

    def check(name: str):
        def found() -> doctor.Finding:
            return doctor.Finding(name, name not in broken, f"{name} says", f"mend {name}")

        return found

    monkeypatch.setattr(doctor, "FOR_THE_TWIN", ((check("twin"), ""), (check("OpenGL"), "")))
    simpler = ("Vulkan", "SAPIEN", "assets")
    monkeypatch.setattr(doctor, "FOR_SIMPLER", tuple((check(name), "") for name in simpler))
    console = Console(width=120, file=io.StringIO())
    status = doctor.main(console)
    return status, console.file.getvalue()  # type: ignore[attr-defined]


def test_doctor_tells_what_each_backend_lacks(monkeypatch):
    status, text = examined(monkeypatch)
    assert status == 0
    assert "backend=mujoco works" in text
    assert "backend=simpler works" in text
    status, text = examined(monkeypatch, "OpenGL", "assets", "SAPIEN")
    assert status == 0
    assert "backend=simpler lacks SAPIEN, assets; type: mend SAPIEN; mend assets" in text
    status, text = examined(monkeypatch, "twin")
    assert status == 1
    assert "backend=mujoco fails: twin says" in text


def test_doctor_turns_what_goes_wrong_into_findings(monkeypatch, tmp_path):
    def boom() -> doctor.Finding:
        raise ImportError("no module named mujoco")

    found = doctor.examine(boom, "the cure")
    assert (found.works, found.cure) == (False, "the cure")
    assert "no module named mujoco" in found.says
    monkeypatch.setenv("SIMPLER_ASSETS", str(tmp_path / "none"))
    assert doctor.assets().cure == doctor.PLACE
    assert "SIMPLER_ASSETS" in doctor.assets().says
    (tmp_path / "none").mkdir()
    assert "243 missing or changed" in doctor.assets().says


def test_doctor_on_vulkan(monkeypatch):
    old = vulkan.Device("llvmpipe (LLVM 15.0.6, 256 bits)", "CPU", "Mesa 22.3.6 (LLVM 15.0.6)")
    new = vulkan.Device(old.name, old.kind, "Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)")
    card = vulkan.Device("a card", "discrete GPU", "570.86")
    for device, works in ((old, False), (new, True), (card, True)):
        monkeypatch.setattr(vulkan, "devices", lambda device=device: [device])
        found = doctor.vulkan_device()
        assert (found.works, found.cure) == (works, "" if works else doctor.SETUP)
        assert device.driver in found.says
    monkeypatch.undo()
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert "no Vulkan loader" in doctor.vulkan_device().says


@pytest.mark.parametrize(
    ("code", "out", "err", "works", "says"),
    [
        (0, "SAPIEN 3 renders on it\n", "", True, "renders on it"),
        (1, "", "noise\nbackend=simpler found no device\n", False, "found no device"),
        (-11, "", "", False, "crashed with signal 11"),
    ],
)
def test_doctor_on_sapien(monkeypatch, code, out, err, works, says):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.0")
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    found = doctor.sapien()
    assert found.works == works
    assert says in found.says


def test_doctor_draws_in_the_twin_here():
    assert doctor.twin().works
    assert "the twin is drawn with" in doctor.opengl().says


def test_doctor_names_the_cure_for_rays(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    found = doctor.opengl()
    assert (found.works, found.cure) == (False, doctor.OPENGL)
    assert "no libEGL" in found.says


@pytest.mark.sim
def test_doctor_here():
    if not os.environ.get("SIMPLER_ASSETS") or not shutil.which("git"):
        pytest.skip("SIMPLER_ASSETS is not set")
    if not (sapien := doctor.sapien()).works:
        pytest.skip(sapien.says)
    assert doctor.vulkan_device().works
    assert doctor.assets().works
