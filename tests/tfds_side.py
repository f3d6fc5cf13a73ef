"""What TFDS reads and writes, for tests/test_tfds.py; run by a Python that has TensorFlow.

python tfds_side.py write FOLDER SCHEMA   made-up episodes with the features in the folder SCHEMA,
                                          whose name is the dataset's too
python tfds_side.py dump FOLDER OUT.npz   everything of the train split, by "episode key"

Several commands may follow one another, as importing TensorFlow takes 7 s.
"""

import sys

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

LENGTHS = (5, 1, 9, 4)  # of the made-up episodes


def leaves(node: object, before: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {before: node}
    found = {}
    for name, child in node.items():
        found |= leaves(child, f"{before}/{name}".strip("/"))
    return found


def skipping(features: object) -> object:
    """Decoders that leave images as they are in the file."""
    if isinstance(features, tfds.features.Image):
        return tfds.decode.SkipDecoding()
    if isinstance(features, tfds.features.Dataset):
        return skipping(features.feature)
    if not isinstance(features, tfds.features.FeaturesDict):
        return None
    parts = {name: skipping(child) for name, child in features.items()}
    return {name: part for name, part in parts.items() if part} or None


def dump(folder: str, out: str) -> None:
    builder = tfds.builder_from_directory(folder)
    arrays = {}
    dataset = builder.as_dataset(
        split="train",
        decoders=skipping(builder.info.features),
        read_config=tfds.ReadConfig(interleave_cycle_length=1),  # shard by shard
    )
    for i, episode in enumerate(dataset):
        steps = [leaves(step) for step in episode.pop("steps")]
        values = {key: decoded(value.numpy()) for key, value in leaves(episode).items()}
        for key in steps[0]:
            values[f"steps/{key}"] = [decoded(step[key].numpy()) for step in steps]
        arrays |= {f"{i} {key}": np.asarray(value) for key, value in values.items()}
    np.savez(out, **arrays)


def decoded(value: object) -> object:
    """Pictures and texts of bytes."""
    if not isinstance(value, bytes):
        return value
    if value[:2] == b"\xff\xd8":
        return tf.io.decode_jpeg(value, channels=3, dct_method="INTEGER_ACCURATE").numpy()
    if value[:4] == b"\x89PNG":
        return tf.io.decode_png(value).numpy()
    return value.decode()


def made_up(feature: object, rng: np.random.Generator) -> object:
    """A random value of a feature."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: made_up(child, rng) for name, child in feature.items()}
    if isinstance(feature, tfds.features.Text):
        return rng.choice(["pick apple", "open top drawer", "größer als 16 Zeichen"])
    if isinstance(feature, tfds.features.Image):
        height, width, _ = feature.shape
        smooth = rng.integers(0, 256, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
        return (smooth + rng.integers(-9, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    if feature.np_dtype == np.float32:
        return rng.normal(size=feature.shape).astype(np.float32)
    low = 0 if feature.np_dtype == np.bool_ else -(2**31)
    return rng.integers(low, 2, feature.shape).astype(feature.np_dtype)


class MadeUp(tfds.core.GeneratorBasedBuilder):
    """Made-up episodes; subclasses say with what features, and their names are the dataset's."""

    VERSION = tfds.core.Version("0.1.0")
    schema = ""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict.from_config(self.schema)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for i, length in enumerate(LENGTHS):
            steps = self.info.features["steps"].feature
            parts = {k: made_up(f, rng) for k, f in self.info.features.items() if k != "steps"}
            yield str(i), {**parts, "steps": [made_up(steps, rng) for _ in range(length)]}


def write(folder: str, schema: str) -> None:
    *_, name = schema.split("/")
    builder = type(name, (MadeUp,), {"schema": schema})(data_dir=folder)
    config = tfds.download.DownloadConfig(num_shards=2)
    builder.download_and_prepare(download_config=config)


if __name__ == "__main__":
    for command, *arguments in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        {"dump": dump, "write": write}[command](*arguments)
