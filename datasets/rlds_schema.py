"""features.json of an RLDS/TFDS dataset: what lies under which key of a record, both ways.

A key is the path of a feature, as it is on the wire: steps/observation/image. Of what lies below
`steps` a record holds T of each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfflow.datasets.spec import UserError

STEPS = "steps/"
_CLASS = "tensorflow_datasets.core.features"


@dataclass(frozen=True)
class Leaf:
    """A feature: "text", "image", "other" or numpy's name of a dtype; -1 is a size that varies.

    `encoding` is that of the bytes of an image (jpeg, png) or of an array (bytes, zlib); an array
    with "none" is a list of numbers.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    encoding: str = "none"

    def __str__(self) -> str:
        sizes = "×".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.dtype} {sizes}".strip()


Schema = Mapping[str, Leaf]
TEXT = Leaf("text")


def image(height: int, width: int) -> Leaf:
    """A JPEG of that size."""
    return Leaf("image", (height, width, 3), "jpeg")


def read_schema(folder: Path) -> dict[str, Leaf]:
    """The features of a dataset by key, in the file's order. Raises UserError if unreadable."""
    path = folder / "features.json"
    try:
        found = _flat(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the features of a dataset ({e!r})") from e
    return {key: leaf for key, leaf in found.items() if key}


def described(schema: Schema) -> dict[str, Any]:
    """The contents of features.json."""
    whole = _node(_tree({k: leaf for k, leaf in schema.items() if not k.startswith(STEPS)}))
    steps = _node(_tree({k[len(STEPS) :]: v for k, v in schema.items() if k.startswith(STEPS)}))
    dataset = _entry("dataset_feature.Dataset", sequence={"feature": steps, "length": "-1"})
    whole["featuresDict"]["features"]["steps"] = dataset
    return whole


def _flat(node: Mapping[str, Any], before: str = "", ragged: bool = False) -> dict[str, Leaf]:
    if "featuresDict" in node:
        return {
            key: leaf
            for name, child in node["featuresDict"]["features"].items()
            for key, leaf in _flat(child, f"{before}/{name}".strip("/"), ragged).items()
        }
    if "sequence" in node:  # of steps: one a step; any other holds a varying number a step
        return _flat(node["sequence"]["feature"], before, ragged or before + "/" != STEPS)
    leaf = _leaf(node)
    return {before: Leaf(leaf.dtype, (-1, *leaf.shape), leaf.encoding) if ragged else leaf}


def _leaf(node: Mapping[str, Any]) -> Leaf:
    if "text" in node:
        return TEXT
    if "classLabel" in node:
        return Leaf("int64")
    kind = "image" if "image" in node else "tensor"
    if kind not in node:
        return Leaf("other")
    about = node[kind]
    shape = tuple(int(size) for size in about.get("shape", {}).get("dimensions", []))
    if kind == "image":
        return Leaf("image", shape, about.get("encodingFormat", "none"))
    dtype = "text" if about["dtype"] in ("string", "object") else about["dtype"]
    return Leaf(dtype, shape, about.get("encoding", "none"))


def _tree(schema: Schema) -> dict[str, Any]:
    """Nested by the parts of the keys."""
    tree: dict[str, Any] = {}
    for key, leaf in schema.items():
        *folders, name = key.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _node(node: Any) -> dict[str, Any]:
    """A node of the tree in TFDS's words."""
    if isinstance(node, Mapping):
        parts = {key: _node(child) for key, child in sorted(node.items())}
        return _entry("features_dict.FeaturesDict", featuresDict={"features": parts})
    if node == TEXT:
        return _entry("text_feature.Text", text={})
    shape = {"dimensions": [str(size) for size in node.shape]} if node.shape else {}
    if node.dtype == "image":
        about = {"dtype": "uint8", "encodingFormat": node.encoding, "shape": shape}
        return _entry("image_feature.Image", image=about)
    name = "tensor_feature.Tensor" if node.shape else "scalar.Scalar"
    return _entry(name, tensor={"dtype": node.dtype, "encoding": node.encoding, "shape": shape})


def _entry(name: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": f"{_CLASS}.{name}", **content}
