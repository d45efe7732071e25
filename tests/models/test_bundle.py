import inspect
import json
import sys
from pathlib import Path

import pytest

from models.bundle import (
    Bundle,
    OutputSpec,
    fingerprint_of,
    read_bundle,
    record_evaluation,
    split_precision,
    write_bundle,
)
from models.documents import document_bytes
from models.errors import BundleError
from models.preprocess import PreprocessSpec

SPEC = PreprocessSpec(height=28, width=28, channels=1, resize=28)


def edit(bundle: Bundle, **fields: object) -> None:
    """Change fields of a bundle's description in place, and its checksum with them."""
    file = bundle.path / "bundle.json"
    file.write_bytes(document_bytes(json.loads(file.read_text()) | fields))


def test_written_bundle_reads_back_equal(make_bundle):
    """What was written is what is read, with every file's hash."""
    bundle = make_bundle(random_twin=True)
    again = read_bundle(bundle.path)
    assert again == bundle
    assert set(again.files) == {"encoder.onnx", "random.onnx"}
    assert again.random_path == bundle.path / "random.onnx"


def test_fingerprint_depends_on_what_decides_a_vector_and_on_nothing_else(make_bundle):
    """Name and place do not matter; graph, preprocessing and output do."""
    one = make_bundle("one", seed=1)
    twin = make_bundle("twin", seed=1, random_twin=True)
    other = make_bundle("one", seed=2)
    assert one.fingerprint == twin.fingerprint != other.fingerprint
    encoder_hash = one.files["encoder.onnx"]
    wider = PreprocessSpec(height=28, width=28, channels=1, resize=32)
    assert fingerprint_of(encoder_hash, SPEC, OutputSpec(dim=16)) == one.fingerprint
    assert fingerprint_of(encoder_hash, wider, OutputSpec(dim=16)) != one.fingerprint
    assert fingerprint_of(encoder_hash, SPEC, OutputSpec(dim=17)) != one.fingerprint


def test_every_precision_has_a_file_and_a_fingerprint_of_its_own(make_bundle, tmp_path):
    """Vectors of another precision are another encoder's; a missing one says how to make it."""
    one, other = make_bundle(seed=1), make_bundle(seed=2)
    bundle = write_bundle(
        tmp_path / "both",
        name="both",
        files={"encoder.onnx": one.encoder_path, "encoder.int8.onnx": other.encoder_path},
        preprocessing=one.preprocessing,
        output=one.output,
        provenance={},
    )
    assert bundle.precisions == ("fp32", "int8")
    assert bundle.path_of("int8") == bundle.path / "encoder.int8.onnx"
    assert bundle.fingerprint_of("encoder.int8.onnx") == other.fingerprint
    assert bundle.fingerprint_of("encoder.onnx") == bundle.fingerprint == one.fingerprint
    with pytest.raises(BundleError, match=r"expected fp32 or int8, found 'fp16'; .* --fp16"):
        bundle.path_of("fp16")


def test_the_file_of_an_encoder_names_its_bundle(make_bundle):
    """What takes a bundle takes any of its encoders, by path."""
    bundle = make_bundle()
    assert split_precision(bundle.path) == (bundle.path, "fp32")
    assert split_precision(bundle.path / "encoder.int8.onnx") == (bundle.path, "int8")
    assert read_bundle(bundle.encoder_path) == bundle
    record_evaluation(bundle.encoder_path, "knn", {"top1": 0.5})
    assert "evaluations" in read_bundle(bundle.path).provenance


def test_missing_bundle_says_what_was_looked_for_and_how_to_make_one(tmp_path):
    """A wrong path is one line with the path, what was found and the command to run."""
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path / "nothing")
    assert str(caught.value) == (
        f"{tmp_path / 'nothing'}: expected a bundle directory, found no such directory; "
        "make one with `python -m train.export RUN --out BUNDLE`"
    )


def test_a_directory_that_is_no_bundle_is_named(tmp_path):
    """An existing directory without a description is told apart from a missing one."""
    with pytest.raises(BundleError, match=r"found no bundle\.json in it"):
        read_bundle(tmp_path)


def test_flipped_byte_is_found(make_bundle):
    """A damaged file is refused with its name and both hashes."""
    bundle = make_bundle()
    content = bytearray(bundle.encoder_path.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.encoder_path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle.path)
    message = str(caught.value)
    assert str(bundle.encoder_path) in message
    assert f"expected SHA-256 {bundle.files['encoder.onnx']}" in message
    assert "the file is damaged" in message
    assert read_bundle(bundle.path, verify=False).files == bundle.files


def test_missing_file_is_named(make_bundle):
    """A file that the description lists must be there."""
    bundle = make_bundle()
    bundle.encoder_path.unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx: expected a file that bundle"):
        read_bundle(bundle.path)


def test_edited_description_does_not_pass_for_another_encoder(make_bundle):
    """The fingerprint is recomputed, so preprocessing cannot be changed by hand."""
    bundle = make_bundle()
    edit(bundle, preprocessing=SPEC.to_json() | {"resize": 40})
    with pytest.raises(BundleError, match="the file was edited: export the bundle again"):
        read_bundle(bundle.path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 99}, "expected schema version 1, found version 99"),
        ({"files": None}, "expected a bundle of schema 1"),
        ({"output": {}}, "no usable field 'dim'"),
        ({"output": {"dim": "wide"}}, "no usable field invalid literal"),
        (
            {"preprocessing": SPEC.to_json() | {"revision": 2}},
            r"bundle\.json: expected .*, found preprocessing\.revision: .*; export it again",
        ),
    ],
)
def test_description_of_another_shape_is_refused(make_bundle, fields, message):
    """A foreign description is one line and no traceback."""
    bundle = make_bundle()
    edit(bundle, **fields)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle.path)


def test_description_that_is_no_json_is_refused(make_bundle):
    """Half a description is refused."""
    bundle = make_bundle()
    for text in ('{"schema_version": 1', "[" * 100_000, "[]"):
        (bundle.path / "bundle.json").write_text(text)
        with pytest.raises(BundleError, match="expected JSON with a schema_version"):
            read_bundle(bundle.path)


def test_file_names_cannot_leave_the_bundle(make_bundle, tmp_path):
    """A description that lists `../x` is refused even where that file exists."""
    bundle = make_bundle()
    (tmp_path / "x").write_text("")
    edit(bundle, files={"encoder.onnx": bundle.files["encoder.onnx"], "../x": "0" * 64})
    with pytest.raises(BundleError, match=r"expected a file that bundle\.json lists"):
        read_bundle(bundle.path)


def test_existing_targets_are_left_alone(make_bundle, tmp_path):
    """A bundle is replaced only on request, anything else never."""
    bundle = make_bundle()
    with pytest.raises(BundleError, match="found a bundle; choose another name"):
        make_bundle(path=bundle.path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    with pytest.raises(BundleError, match="found something else of that name"):
        make_bundle(path=tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_text() == "precious"


def test_replacing_gives_the_new_bundle_whole(make_bundle, tmp_path):
    """`replace` swaps the directory and leaves no temporary names behind."""
    old, new = make_bundle(seed=1), make_bundle(seed=2)
    written = write_bundle(
        old.path,
        name="new",
        files={"encoder.onnx": new.encoder_path},
        preprocessing=new.preprocessing,
        output=new.output,
        provenance={},
        replace=True,
    )
    assert written.fingerprint == new.fingerprint
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")] == []


def test_an_evaluation_is_kept_and_changes_no_fingerprint(make_bundle):
    """What was measured stands in the provenance; the encoder stays who it is."""
    bundle = make_bundle()
    record_evaluation(bundle.path, "knn", {"top1": 0.5})
    record_evaluation(bundle.path, "knn", {"top1": 0.75})
    again = read_bundle(bundle.path)
    assert again.provenance == {"command": "tests", "evaluations": {"knn": {"top1": 0.75}}}
    assert again.fingerprint == bundle.fingerprint


def test_an_evaluation_of_another_precision_stands_beside_that_of_fp32(make_bundle):
    """Neither takes the other's place."""
    bundle = make_bundle()
    for file_name, top1 in (("encoder.onnx", 0.5), ("encoder.int8.onnx", 0.25)):
        record_evaluation(bundle.path / file_name, "knn", {"top1": top1})
    kept = read_bundle(bundle.path).provenance["evaluations"]
    assert kept == {"knn": {"top1": 0.5}, "knn.int8": {"top1": 0.25}}


def test_a_bundle_without_its_encoder_is_not_written(tmp_path):
    """The encoder's file is not optional."""
    with pytest.raises(BundleError, match=r"expected encoder\.onnx, found none"):
        write_bundle(
            Path(tmp_path / "b"),
            name="b",
            files={},
            preprocessing=SPEC,
            output=OutputSpec(dim=1),
            provenance={},
        )
    assert not (tmp_path / "b").exists()


def test_an_edit_that_the_fingerprint_does_not_cover_is_found(make_bundle):
    """`bundle.json` has a checksum of its own."""
    bundle = make_bundle()
    file = bundle.path / "bundle.json"
    text = file.read_text()
    name = f'"name": "{bundle.name}"'
    assert name in text
    file.write_text(text.replace(name, '"name": "another"'))
    with pytest.raises(BundleError, match=r"bundle.json: expected checksum [0-9a-f]{64}, found"):
        read_bundle(bundle.path)
    file.write_text(text.replace('"dim": ', '"dim": NaN, "was": '))
    with pytest.raises(BundleError, match="expected JSON with a schema_version"):
        read_bundle(bundle.path)
    document = json.loads(text)
    del document["checksum"]
    file.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"bundle.json: expected checksum of its own, found"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("key", ["schema_version", "checksum"])
@pytest.mark.parametrize("value", ["a\nb", "\ud800", "9" * 9000, ["x"] * 9000])
def test_what_a_damaged_description_says_is_repeated_in_one_short_line(make_bundle, key, value):
    """It may hold line breaks, halves of characters, and any number of digits."""
    file = make_bundle().path / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}, indent=2))
    with pytest.raises(BundleError) as caught:
        read_bundle(file.parent)
    line = str(caught.value).encode()
    assert b"\n" not in line
    assert len(line) < 500


def test_nesting_at_the_edge_of_what_can_be_parsed_is_refused(make_bundle):
    """Whichever of the steps it is too deep for."""
    file = make_bundle().path / "bundle.json"
    document = json.loads(file.read_text())
    edge = sys.getrecursionlimit() - len(inspect.stack(0))
    for depth in range(edge - 25, edge):
        nested = "[" * depth + "]" * depth
        try:
            content = document_bytes(document | {"nested": json.loads(nested)}).decode()
        except RecursionError:
            text = json.dumps(document, indent=2)
            content = text.replace('"checksum"', f'"nested": {nested}, "checksum"', 1)
        file.write_text(content.replace('"name"', ' "name"'))
        with pytest.raises(BundleError):
            read_bundle(file.parent, verify=False)


def test_every_flipped_byte_of_the_description_is_found_at_opening(make_bundle):
    """Also in white space, and in the name of the checksum itself."""
    bundle = make_bundle()
    file = bundle.path / "bundle.json"
    content = file.read_bytes()
    for at in range(len(content)):
        for mask in (0x01, 0x2A):
            damaged = bytearray(content)
            damaged[at] ^= mask
            file.write_bytes(damaged)
            with pytest.raises(BundleError):
                read_bundle(bundle.path, verify=False)
    file.write_bytes(content)
    assert read_bundle(bundle.path) == bundle


def test_a_description_that_is_too_large_is_not_read(make_bundle):
    """A header may promise anything; a gibibyte of it is not taken into memory."""
    bundle = make_bundle()
    with (bundle.path / "bundle.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match="expected at most 67108864 bytes, found 1073741824"):
        read_bundle(bundle.path)
