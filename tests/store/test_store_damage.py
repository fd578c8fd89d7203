"""Damage is found, and its file named."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import Capture, make_table

from ctrak_lightning import Attributor, Concept, Sampler
from ctrak_lightning.errors import CorruptStoreError, GradientError, MethodError, StoreError
from ctrak_lightning.methods.trajectories import Generation
from ctrak_lightning.store import IncompleteStoreWarning, TraceStore
from ctrak_lightning.store.arrays import open_for_reading, row_sums

from ..toy import QuickDiffusion

SHARD = "checkpoint-00000300/rank0-00001.h5"
FILES = [
    "samples.h5",
    SHARD,
    "checkpoint-00000600/kernel.h5",
    "checkpoint-00000600/weights.safetensors",
]


@pytest.fixture
def path(tmp_path: Path, capture: Capture) -> Path:
    return capture.run(tmp_path / "store")


def read_everything(path: Path) -> list[torch.Tensor]:
    store = TraceStore(path)
    assert len(store.samples) == len(store)
    store.verify()
    features = []
    for checkpoint in store.checkpoints:
        features.append(checkpoint.features())
        for read in (checkpoint.losses, checkpoint.norms, checkpoint.kernel):
            read()
        if checkpoint.has_weights:
            checkpoint.weights()
    return features


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_found_at_open(path: Path, name: str) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(
        CorruptStoreError, match=f"{name} has {len(content) - 1} bytes.*{len(content)} bytes.*HINT"
    ):
        TraceStore(path)
    (path / name).unlink()
    with pytest.raises(CorruptStoreError, match=f"{name} is missing.*{len(content)} bytes"):
        TraceStore(path)


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_file_with_one_flipped_bit(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    (problem,) = TraceStore(path).verify()
    assert problem.startswith(f"{name}: sha256 is ")


def test_verify_names_missing_and_unrecorded_files(path: Path) -> None:
    store = TraceStore(path)
    (path / SHARD).unlink()
    (path / "checkpoint-00000300" / "extra.h5").write_text("")
    first, second = store.verify()
    assert first.startswith(f"{SHARD}: cannot be read")
    assert second == "checkpoint-00000300/extra.h5: not recorded in the manifest"


def flip(path: Path, values: np.ndarray) -> None:
    """Flip one bit of ``values`` where the file at ``path`` stores them."""
    content = bytearray(path.read_bytes())
    assert content.count(values.tobytes()) == 1
    content[content.index(values.tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["features", "norm", "loss", "index"])
def test_reading_a_flipped_shard_raises(path: Path, column: str) -> None:
    with h5py.File(path / SHARD) as file:
        values = file[column][:]
    flip(path / SHARD, values)
    checkpoint = TraceStore(path).checkpoints[0]
    found = "features of row [0-3] are not" if column == "features" else "HDF5 reports"
    with pytest.raises(CorruptStoreError, match=f"{SHARD}: {found}.*HINT"):
        checkpoint.features()
    with pytest.raises(CorruptStoreError, match=SHARD):
        list(checkpoint.shards())


def test_reading_flipped_kernels_weights_and_samples_raises(path: Path) -> None:
    with h5py.File(path / "checkpoint-00000300/kernel.h5") as file:
        flip(path / "checkpoint-00000300/kernel.h5", file["eigenvectors"][:])
    flip(path / "checkpoint-00000300/weights.safetensors", np.full(3, 300, dtype=np.float32))
    flip(path / "samples.h5", np.frombuffer(b"image/003.png", dtype=np.uint8))
    store = TraceStore(path)
    for read in (store.checkpoints[0].kernel, store.checkpoints[0].weights, lambda: store.samples):
        with pytest.raises(CorruptStoreError, match="HINT"):
            read()


def rewrite(path: Path, change: Callable[[h5py.File], object]) -> None:
    """Change the HDF5 file at ``path`` and record its new size, as a hostile hand would."""
    with h5py.File(path, "r+") as file:
        change(file)
    manifest = json.loads((path.parents[1] / "manifest.json").read_text())
    manifest["files"][f"{path.parent.name}/{path.name}"]["bytes"] = path.stat().st_size
    (path.parents[1] / "manifest.json").write_text(json.dumps(manifest))


def replace(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=values)

    return change


def link(target: h5py.ExternalLink | h5py.SoftLink) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["features"]
        file["features"] = target

    return change


def make_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 6), "f4")
    layout[:] = h5py.VirtualSource("absent.h5", "features", (4, 6))
    del file["features"]
    file.create_virtual_dataset("features", layout)


@pytest.mark.parametrize(
    "change",
    [
        replace("features", np.ones((4, 7), "f4")),
        replace("features", np.ones((3, 6), "f4")),
        replace("features", np.ones((4, 6), "f2")),
        replace("features", np.ones(24, "f4")),
        replace("features", np.ones((4, 6), "f4")),
        lambda file: (file.__delitem__("features"), file.create_dataset("features", (4, 6), "f4")),
        lambda file: file.__setitem__("checksum", file.pop("checksum")[:] + 1),
        lambda file: (
            file.move("features", "old"),
            file.create_dataset("features", data=file["old"][:], chunks=(2, 6)),
        ),
        lambda file: (
            file.move("features", "old"),
            file.create_dataset("features", (4, 6), "f4", external=[("rank0-00000.h5", 0, 96)]),
        ),
        replace("index", np.array([0, 1, 2, 10])),
        replace("index", np.array([0, 1, 2, -1])),
        replace("index", np.array([0, 0, 1, 2])),
        replace("index", np.arange(8)),
        replace("index", np.zeros((4, 1), int)),
        replace("index", np.zeros(0, int)),
        replace("index", np.arange(4.0)),
        replace("norm", np.zeros(4, "f4")),
        replace("norm", np.full(4, np.nan, "f4")),
        lambda file: file.__delitem__("loss"),
        lambda file: (file.__delitem__("loss"), file.create_group("loss")),
        lambda file: (
            file.__delitem__("features"),
            file.create_dataset("features", (2**40, 6), "f4", chunks=True),
        ),
        link(h5py.ExternalLink("rank0-00000.h5", "features")),
        link(h5py.SoftLink("/norm")),
        make_virtual,
    ],
)
def test_shards_of_other_content_are_refused(
    path: Path, change: Callable[[h5py.File], object]
) -> None:
    rewrite(path / SHARD, change)
    with pytest.raises(CorruptStoreError, match="checkpoint-00000300"):
        read_everything(path)


def test_a_shard_replaced_by_another_is_refused(path: Path) -> None:
    shutil.copy(path / "checkpoint-00000300/rank0-00000.h5", path / SHARD)
    checkpoint = TraceStore(path).checkpoints[0]
    for read in (checkpoint.features, checkpoint.losses, checkpoint.norms):
        with pytest.raises(CorruptStoreError, match="names a sample twice"):
            read()


def test_kernel_of_other_size_is_refused(path: Path) -> None:
    rewrite(path / "checkpoint-00000300/kernel.h5", lambda file: file.attrs.modify("n", 11))
    with pytest.raises(CorruptStoreError, match="is the kernel of"):
        TraceStore(path).checkpoints[0].kernel()


def test_unsealed_checkpoints_are_named_and_left_out(path: Path, capture: Capture) -> None:
    capture.run_checkpoint(capture.open(path), 900, stop=5)
    with pytest.warns(IncompleteStoreWarning, match=r"steps \[900\].*HINT"):
        store = TraceStore(path)
    assert [checkpoint.step for checkpoint in store.checkpoints] == [300, 600]
    assert store.verify() == []


def test_stores_without_a_sealed_checkpoint(tmp_path: Path, capture: Capture) -> None:
    writer = capture.open(tmp_path)
    with pytest.raises(StoreError, match=r"no sealed checkpoint .begun: none.*HINT"):
        TraceStore(tmp_path)
    writer.write_samples(make_table())
    capture.run_checkpoint(writer, 300, stop=5)
    with pytest.raises(
        StoreError, match=r"no sealed checkpoint .begun: \[300\].*ended before it.*HINT.*go on"
    ):
        TraceStore(tmp_path)


def test_places_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(StoreError, match="HINT"):
            TraceStore(place)


def edited(path: Path, *keys: Any, value: Any) -> Path:
    manifest = json.loads((path / "manifest.json").read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


RECORD = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), 1, "schema is 1, this version of ctrak-lightning reads 4 and 5"),
        (("schema",), "1", "schema"),
        (("schema",), True, "schema"),
        (("extra",), 1, r"unknown keys \['extra'\]"),
        (("run_id",), 5, "run_id is 5, expected a string"),
        (("header", "dim"), "6", "expected an int of at least 1"),
        (("header", "dim"), 10**9, "need 40000000000 bytes"),
        (("header", "method"), None, "method"),
        (("files",), [], r"files is \[\], expected an object"),
        (("files", "/etc/passwd"), RECORD, "/etc/passwd.*not a path that a store uses"),
        (("files", "../x.h5"), RECORD, "not a path that a store uses"),
        (("files", "checkpoint-00000300/../../x.h5"), RECORD, "not a path that a store uses"),
        (
            ("files", "checkpoint-00000300/rank0-\u0661\u0661\u0661\u0661\u0661.h5"),
            RECORD,
            "not a path",
        ),
        (("files", "checkpoint-00000900/kernel.h5"), RECORD, "belongs to no recorded checkpoint"),
        (("files", "samples.h5", "sha256"), "abc", "64 hexadecimal digits"),
        (("files", "samples.h5", "bytes"), -1, "bytes is -1, expected an integer"),
        (("checkpoints", 0, "shards", 0), "/etc/passwd", "not a path that a store uses"),
        (
            ("checkpoints", 0, "shards", 0),
            "../checkpoint-00000300/rank0-00000.h5",
            "not a path that a store uses",
        ),
        (("checkpoints", 0, "shards", 0), SHARD, "names a shard twice"),
        (
            ("checkpoints", 0, "shards", 0),
            "checkpoint-00000600/rank0-00000.h5",
            "not among the recorded files",
        ),
        (("checkpoints", 0, "step"), 299, "not among the recorded files of checkpoint-00000299"),
        (("checkpoints", 0, "step"), 300.0, "step is 300.0, expected an integer"),
        (("checkpoints", 0, "sealed"), 1, "sealed is 1, expected true or false"),
        (("checkpoints", 0, "rows"), 9, "sealed with 9 rows, samples.h5 has 10 samples"),
        (("checkpoints", 0, "rows"), 10**15, "rows of 6 float32 features need"),
        (("checkpoints", 0, "learning_rate"), "0.1", "learning_rate"),
        (("checkpoints", 0, "learning_rate"), 10**400, "learning_rate"),
        (("checkpoints", 0, "learning_rate"), float("nan"), "not valid JSON .NaN"),
    ],
)
def test_manifests_that_no_writer_writes(
    path: Path, keys: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        TraceStore(edited(path, *keys, value=value))
    assert isinstance(caught.value, CorruptStoreError) == (not message.startswith("schema is 1"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*FILES, "..", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [here, *(place for key, item in inner for place in places(item, (*here, key)))]


def mutate(manifest: Any, data: st.DataObject) -> Any:
    """Replace, remove or move one value, anywhere."""
    *parents, key = data.draw(st.sampled_from(places(manifest)[1:]))
    place = manifest
    for parent in parents:
        place = place[parent]
    action = data.draw(st.sampled_from(["replace", "remove", "copy", "rename", "root"]))
    if action == "root":
        return data.draw(JSON)
    if action == "remove":
        del place[key]
    elif action == "rename" and isinstance(place, dict):
        place[data.draw(st.text(max_size=8) | st.sampled_from(FILES))] = place.pop(key)
    elif action == "copy":
        other = manifest
        for step in data.draw(st.sampled_from(places(manifest))):
            other = other[step]
        place[key] = json.loads(json.dumps(other))
    else:
        place[key] = data.draw(JSON)
    return manifest


def either_sound_or_refused(path: Path, text: bytes, features: list[torch.Tensor]) -> None:
    (path / "manifest.json").write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteStoreWarning)
        try:
            found = read_everything(path)
        except StoreError:
            return
    assert found
    assert all(any(torch.equal(values, known) for known in features) for values in found)


@pytest.fixture(scope="module")
def victim(
    tmp_path_factory: pytest.TempPathFactory, capture: Capture
) -> tuple[Path, bytes, list[torch.Tensor]]:
    path = capture.run(tmp_path_factory.mktemp("victim"))
    return path, (path / "manifest.json").read_bytes(), read_everything(path)


@settings(max_examples=250)
@given(data=st.data())
def test_any_mutation_of_the_manifest_is_refused_or_harmless(
    victim: tuple[Path, bytes, list[torch.Tensor]], data: st.DataObject
) -> None:
    path, whole, features = victim
    mutated = mutate(json.loads(whole), data)
    either_sound_or_refused(path, json.dumps(mutated).encode(), features)


@settings(max_examples=150)
@given(start=st.integers(0, 10**4), length=st.integers(0, 60), inserted=st.binary(max_size=6))
def test_any_edit_of_the_manifest_bytes_is_refused_or_harmless(
    victim: tuple[Path, bytes, list[torch.Tensor]], start: int, length: int, inserted: bytes
) -> None:
    path, whole, features = victim
    start %= len(whole)
    either_sound_or_refused(path, whole[:start] + inserted + whole[start + length :], features)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 10**5, b"9" * 5000, b'{"schema": 4}', b"null"]
)
def test_text_that_is_no_manifest(
    victim: tuple[Path, bytes, list[torch.Tensor]], text: bytes
) -> None:
    path, _, _ = victim
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CorruptStoreError, match=r"manifest\.json.*HINT"):
        TraceStore(path)


RED_DOT = {"colour": "red", "shape": "dot"}
RULES: dict[str, list[Any]] = {
    "damping": [
        {"class": "Fixed", "damping": 0.5},
        {"class": "Agreement", "dampings": [0.1, 1.0, None]},
    ],
    "ensemble": [{"class": "LearningRate"}, {"class": "Standardised"}],
    "query": [[{"objective": {"class": "MeanOutput", "absolute": False}, "side": "present"}]],
    "query_trajectory": [
        {"class": "Noised", "timesteps": 2, "shared_noise": True, "start": 0.0, "end": 1.0},
        {"class": "Inverted", "steps": 3, "guidance": 1.0, "timesteps": 2},
        {"class": "Renoised", "timesteps": 2},
    ],
}
BROKEN = [
    *("null", "true", "-1", "0", "1", "1.5", "1e308", "1e400", "NaN", '"x"', "[]", "{}"),
    *("9" * 400, "[0.5]", '["x"]', f"[{', '.join(['1.0'] * 1001)}]", '{"a":' * 60 + "1" + "}" * 60),
    *("[" * depth + "]" * depth for depth in (400, 2000)),
]


def attributor(path: Path, module: QuickDiffusion) -> Attributor:
    return Attributor(path, module, sampler=Sampler(steps=3), record=False)


def asked(path: Path, module: QuickDiffusion, image: Generation) -> bool:
    """Whether a question of the store is answered, and not refused."""
    concept = Concept("red", RED_DOT, {"shape": "dot"})
    try:
        [result] = attributor(path, module).attribute_many([concept], generation=image)
        assert result.scores.isfinite().all()
    except (StoreError, MethodError, GradientError) as error:
        told = str(error)
    else:
        return True
    assert len(told) < 2000
    return False


@pytest.mark.filterwarnings("ignore")
def test_any_value_of_the_method_is_refused_or_asked(tmp_path: Path) -> None:
    path = shutil.copytree(Path(__file__).parent / "earlier" / "schema_5", tmp_path / "traces")
    manifest = json.loads((path / "manifest.json").read_text())
    sound, module = manifest["header"]["method"], QuickDiffusion()
    image = attributor(path, module).generate([RED_DOT], [0])
    sound["query_trajectory"]["timesteps"] = 2  # of a generation of three steps
    # Of equal things the first two; the training side has the objective of the query's terms.
    equal = (("query", 1), ("training", "objective"))
    cases = [
        (sound, place)
        for place in places(sound)[1:]
        if not {2, 3} & {*place} and (place[:2] not in equal or len(place) == 2)
    ]
    for field, rules in RULES.items():
        for rule in rules:
            own = sound | {field: rule}
            cases += [(own, place) for place in places(own)[1:] if place[0] == field]
    done: dict[int, bool] = {}
    for method, (*parents, key) in cases:
        for value in BROKEN:
            changed = place = json.loads(json.dumps(method))
            for parent in parents:
                place = place[parent]
            place[key] = "HERE"
            manifest["header"]["method"] = changed
            text = json.dumps(manifest).replace('"HERE"', value)
            if hash(text) not in done:
                (path / "manifest.json").write_text(text)
                done[hash(text)] = asked(path, module, image)
    assert 30 < sum(done.values()) < len(done) / 5


def test_more_dampings_than_are_scored_are_refused_at_once(tmp_path: Path) -> None:
    """Each would have taken as many scores as there are samples."""
    path = shutil.copytree(Path(__file__).parent / "earlier" / "schema_5", tmp_path / "traces")
    manifest = json.loads((path / "manifest.json").read_text())
    dampings = {"class": "Agreement", "dampings": [1.0] * 200_000}
    manifest["header"]["method"]["damping"] = dampings
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptStoreError, match="expected 1 to 1000 dampings.*HINT"):
        Attributor(path, QuickDiffusion())


@pytest.mark.parametrize("width", [1, 7, 8, 24, 27])
def test_every_flipped_bit_changes_the_checksum_of_its_row_alone(width: int) -> None:
    rows = np.random.default_rng(width).integers(0, 256, (3, width), dtype=np.uint8)
    before = row_sums(rows)
    for bit in range(8 * width):
        rows[1, bit // 8] ^= 1 << bit % 8
        assert (row_sums(rows) != before).tolist() == [False, True, False]
        rows[1, bit // 8] ^= 1 << bit % 8


def test_the_checksum_of_a_row_is_the_sum_of_its_words_and_last_bytes() -> None:
    rows = np.array([[*(255,) * 8, 2, *(0,) * 7, 3, 4], [*(0,) * 18]], dtype=np.uint8)
    assert row_sums(rows).tolist() == [(2**64 - 1 + 2 + 3 + 4) % 2**64, 0]


def test_an_address_in_a_file_that_is_no_address_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 asks Python for bytes at an offset that was read from the file, which need not fit a C
    long."""

    def beyond(*_: object, **__: object) -> None:
        raise OverflowError("Python int too large to convert to C long")

    (tmp_path / "shard.h5").write_bytes(b"0")
    monkeypatch.setattr("h5py.File", beyond)
    with (
        pytest.raises(CorruptStoreError, match=r"shard\.h5.*too large"),
        open_for_reading(tmp_path / "shard.h5"),
    ):
        pass
