"""GGUF files: what a good one gives, and that every bad one gives a single clear sentence."""

import errno
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.ggufs import (
    Blocks,
    Raw,
    Typed,
    gguf_bytes,
    random_tensor,
    string,
    write_gguf,
    write_split,
)
from tools.fuzz_gguf import fuzz

from cmr.errors import FileError
from cmr.gguf_file import open_gguf
from cmr.gguf_header import MAX_HEADER_BYTES
from cmr.quants import FORMATS, UNSUPPORTED, format_by_name, format_of, row_bytes, type_name

ONES = np.ones(3, np.float32)


def refusal(path: Path) -> str:
    """Open a bad file and return the sentence that says what is wrong with it."""
    with pytest.raises(FileError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert str(path.parent) in message and "\n" not in message
    return message


@pytest.fixture
def bad(tmp_path):
    """Write bytes as a file and return the refusal."""

    def write(data: bytes) -> str:
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        return refusal(path)

    return write


def test_scalars_of_every_type_come_back(tmp_path):
    scalars = {
        "a.u8": Typed("u8", 255),
        "a.i8": Typed("i8", -128),
        "a.u16": Typed("u16", 65535),
        "a.i16": Typed("i16", -32768),
        "a.u32": Typed("u32", 2**32 - 1),
        "a.i32": Typed("i32", -(2**31)),
        "a.f32": Typed("f32", 0.5),
        "a.u64": Typed("u64", 2**64 - 1),
        "a.i64": Typed("i64", -(2**63)),
        "a.f64": Typed("f64", 0.1),
        "a.yes": Typed("bool", 1),
        "a.no": Typed("bool", 0),
        "a.text": "Grüße, 世界",
        "a.empty": "",
    }
    found = open_gguf(write_gguf(tmp_path / "a.gguf", scalars)).metadata
    assert found == {key: item.value if isinstance(item, Typed) else item for key, item in scalars.items()}
    assert found["a.yes"] is True and found["a.no"] is False and type(found["a.u8"]) is int


def test_arrays_of_every_type_come_back(tmp_path):
    kinds = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
    arrays = {f"a.{kind}": np.array([0, 1, 100], kind) for kind in kinds}
    arrays |= {"a.bool": np.array([True, False]), "a.none": np.array([], "f4")}
    file = open_gguf(
        write_gguf(tmp_path / "a.gguf", arrays | {"a.text": [b"\xff", "é", b""], "a.nothing": []})
    )
    file.close()
    for key, expected in arrays.items():
        assert file.metadata[key].dtype == expected.dtype
        np.testing.assert_array_equal(file.metadata[key], expected)
    assert file.metadata["a.text"] == [b"\xff", "é".encode(), b""]
    assert file.metadata["a.nothing"] == []


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_tensors_are_views_of_the_map(tmp_path, version, alignment):
    weights = {
        "plain": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "half": np.arange(5, dtype=np.float16),
        "blocks": random_tensor(np.random.default_rng(0), "Q4_K", 3, 512),
    }
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.alignment": alignment}, weights, version=version, alignment=alignment)
    file = open_gguf(path)
    assert (file.version, file.path, file.nbytes) == (version, path, path.stat().st_size)
    assert list(file.tensors) == list(weights)
    plain = file.tensors["plain"]
    assert (plain.shape, plain.type, plain.nbytes) == ((2, 3, 4), 0, 96)
    np.testing.assert_array_equal(plain.data.view(np.float32).reshape(plain.shape), weights["plain"])
    assert file.tensors["blocks"].data.tobytes() == weights["blocks"].bytes
    for tensor in file.tensors.values():
        assert not tensor.data.flags.writeable and tensor.data.dtype == np.uint8
        assert tensor.data.ctypes.data == tensor.address == tensor.source.address + tensor.offset
        assert tensor.offset % alignment == 0 and tensor.source.path == path


def test_an_independent_reader_and_writer_agree(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "bc"])
    writer.add_float64("some.double", 0.1)
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["some.numbers"].tolist() == [1, 2, 3]
    assert file.metadata["some.texts"] == [b"a", b"bc"]
    assert file.metadata["some.double"] == 0.1
    assert file.tensors["w"].shape == (2, 32)

    ours = write_gguf(tmp_path / "b.gguf", {"general.architecture": "x"}, {"w": np.ones((2, 3), np.float32)})
    (tensor,) = gguf.GGUFReader(ours).tensors
    assert (tensor.name, tensor.data.tolist()) == ("w", [[1, 1, 1], [1, 1, 1]])


def test_views_outlive_close_and_new_ones_are_refused(tmp_path):
    with open_gguf(write_gguf(tmp_path / "a.gguf", {}, {"w": ONES})) as file:
        kept = file.tensors["w"].data
    assert kept.view(np.float32).tolist() == [1, 1, 1]
    with pytest.raises(FileError, match="was closed"):
        _ = file.tensors["w"].data
    file.close()


def test_a_copy_holds_what_the_map_holds(parts):
    with open_gguf(parts[0]) as mapped, open_gguf(parts[0], mapped=False) as copied:
        assert mapped.metadata == copied.metadata and list(mapped.tensors) == list(copied.tensors)
        for name, tensor in mapped.tensors.items():
            assert copied.tensors[name].data.tobytes() == tensor.data.tobytes()
        assert all(file.copied for file in copied.files) and not any(file.copied for file in mapped.files)


def test_advice_loses_nothing(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {}, {"w": ONES})
    for mapped in (True, False):
        file = open_gguf(path, mapped)
        for advice in ("MADV_DONTNEED", "MADV_NO_SUCH_ADVICE"):
            file.files[0].advise(advice)
        assert file.tensors["w"].data.view(np.float32).tolist() == ONES.tolist()
        file.close()
        file.files[0].advise("MADV_DONTNEED")


# -- types ------------------------------------------------------------------------


def test_block_sizes_are_those_of_the_reference():
    sizes = gguf.GGML_QUANT_SIZES
    for number, layout in (FORMATS | UNSUPPORTED).items():
        kind = gguf.GGMLQuantizationType(number)
        assert (layout.type, layout.name) == (number, kind.name)
        assert (layout.elements, layout.bytes) == sizes[kind]


def test_formats_by_name_and_number():
    assert format_by_name("q4_k") is format_of(12) is FORMATS[12]
    assert row_bytes(12, 512) == 288
    assert (type_name(16), type_name(99)) == ("IQ2_XXS", "unknown (99)")
    with pytest.raises(FileError, match="IQ2_XXS is not supported; there are: F32 F16"):
        format_of(16)
    with pytest.raises(FileError, match="'q9' is not supported"):
        format_by_name("q9")
    with pytest.raises(FileError, match="260 elements"):
        row_bytes(12, 260)


def test_unsupported_types_open_but_their_weights_are_refused(tmp_path):
    weights = {"known": Blocks(16, (2, 256), bytes(132)), "foreign": Blocks(77, (5,), bytes(5)), "fine": ONES}
    file = open_gguf(write_gguf(tmp_path / "a.gguf", {}, weights))
    assert [tensor.type_name for tensor in file.tensors.values()] == ["IQ2_XXS", "unknown (77)", "F32"]
    assert [tensor.nbytes for tensor in file.tensors.values()] == [132, 0, 12]
    assert file.tensors["fine"].data.view(np.float32).tolist() == [1, 1, 1]
    for name in ("known", "foreign"):
        with pytest.raises(FileError, match=f"'{name}' .* unsupported type .* there are: F32"):
            _ = file.tensors[name].data
        with pytest.raises(FileError):
            _ = file.tensors[name].address


# -- split models -----------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    weights = {f"w{i}": np.full(i + 1, i, np.float32) for i in range(7)}
    return write_split(tmp_path, "big-model", 3, {"general.architecture": "llama"}, weights)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_the_whole_model(parts, given):
    file = open_gguf(parts[given])
    assert file.path == parts[given]
    assert file.metadata["general.architecture"] == "llama" and file.metadata["split.no"] == 0
    assert file.nbytes == sum(part.stat().st_size for part in parts)
    assert list(file.tensors) == ["w0", "w3", "w6", "w1", "w4", "w2", "w5"]
    for i in range(7):
        tensor = file.tensors[f"w{i}"]
        assert tensor.data.view(np.float32).tolist() == [i] * (i + 1)
        assert tensor.source.path == parts[i % 3]


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    message = refusal(parts[2])
    assert "one of 3 parts" in message and message.endswith("big-model-00002-of-00003.gguf")


def test_many_missing_parts_are_counted(tmp_path):
    parts = write_split(tmp_path, "m", 20, {}, {"w": ONES})
    for part in parts[1:]:
        part.unlink()
    assert refusal(parts[0]).endswith("m-00006-of-00020.gguf and 14 more")


def test_a_renamed_part_is_refused(parts):
    assert "need names like NAME-00001-of-00003.gguf" in refusal(
        parts[0].rename(parts[0].with_name("a.gguf"))
    )


def test_swapped_parts_are_refused(parts):
    parts[1].replace(parts[2].with_name("x"))
    parts[2].replace(parts[1])
    parts[2].with_name("x").replace(parts[2])
    assert "does not belong here" in refusal(parts[0])


def test_parts_of_different_models_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    parts = write_split(tmp_path, "m", 2, {}, {"a": ONES, "b": ONES})
    others = write_split(tmp_path / "other", "m", 2, {}, {"a": ONES, "b": ONES, "c": ONES, "d": ONES})
    others[1].replace(parts[1])
    assert "parts of different models are mixed" in refusal(parts[0])


def test_a_tensor_in_two_parts_is_refused(parts):
    keys = {"split.no": Typed("u16", 1), "split.count": Typed("u16", 3)}
    write_gguf(parts[1], keys, {"w0": ONES})
    assert "'w0' twice" in refusal(parts[0])


def test_a_damaged_part_is_named(parts):
    parts[2].write_bytes(b"PK\x03\x04")
    assert refusal(parts[0]) == f"{parts[2]} is not a GGUF file: it begins with b'PK\\x03\\x04'"


@pytest.mark.parametrize("count", [Typed("u16", 0), Typed("u16", 1), [b"2"], np.array([2], "u2"), "2"])
def test_counts_that_mean_no_split(tmp_path, count):
    file = open_gguf(write_gguf(tmp_path / "merged.gguf", {"split.count": count}, {"w": ONES}))
    assert list(file.tensors) == ["w"]


@pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
@pytest.mark.parametrize("hostile", [np.arange(3), [b"a"], "1", Typed("bool", 1)])
def test_split_keys_of_wrong_types_are_refused(parts, key, hostile):
    keys = {"split.no": Typed("u16", 0), "split.count": Typed("u16", 3)} | {key: hostile}
    write_gguf(parts[0], keys, {"w": ONES})
    assert refusal(parts[1])


# -- files that are no GGUF -------------------------------------------------------


def test_the_file_system_says_no(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.gguf")
    assert "is a folder" in refusal(Path(f"{tmp_path}/."))
    (tmp_path / "empty.gguf").touch()
    assert "is empty" in refusal(tmp_path / "empty.gguf")
    assert "cannot be read" in refusal(tmp_path / "nul\0.gguf")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / "loop")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_no_permission(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # By hand, because the superuser, who runs tests in containers, may read everything.
    monkeypatch.setattr("builtins.open", denied)
    assert refusal(path) == f"{path} cannot be read: Permission denied"


def test_foreign_files(bad):
    assert bad(b"PK\x03\x04 and so on").endswith("is not a GGUF file: it begins with b'PK\\x03\\x04'")
    assert "not a GGUF file" in bad(b"GG")
    assert "git lfs pull" in bad(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "big-endian" in bad(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in bad(b"FUGG" + struct.pack(">IQQ", 3, 0, 0))


@pytest.mark.parametrize("version", [0, 1, 4, 77])
def test_other_versions(bad, version):
    message = bad(gguf_bytes(version=version))
    assert f"version {version}; versions 2 and 3 are supported" in message
    assert ("convert" in message) == (version == 1)


# -- hostile headers --------------------------------------------------------------

HUGE = 2**64 - 1


def head(tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def array(code: int, count: int, data: bytes = b"") -> Raw:
    return Raw(9, struct.pack("<IQ", code, count) + data)


def index_entry(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def one_tensor(*args, room: int = 4096) -> bytes:
    return head(tensors=1) + index_entry("w", *args) + bytes(room)


HOSTILE = {
    "nothing after the magic": (b"GGUF", "truncated"),
    "no counts": (b"GGUF\x03\0\0\0", "truncated"),
    "huge key count": (head(keys=HUGE), "metadata keys"),
    "key count beyond the file": (head(keys=60000), "60000 metadata keys would go past the end"),
    "huge tensor count": (head(tensors=HUGE), "tensors"),
    "tensor count beyond the file": (head(tensors=60000), "60000 tensors would go past the end"),
    "huge key length": (head(keys=1) + struct.pack("<Q", HUGE) + bytes(64), "65535 are possible"),
    "key length beyond the file": (head(keys=1) + struct.pack("<Q", 5000) + bytes(64), "past the end"),
    "non-UTF-8 key": (gguf_bytes([(b"\xff\xfe", 1)]), "not UTF-8"),
    "duplicate keys": (gguf_bytes([("a.b", 1), ("a.b", 2)]), "'a.b' twice"),
    "unknown value type": (gguf_bytes({"a": Raw(13, bytes(8))}), "unknown value type 13"),
    "no value": (head(keys=1) + string("abcdef") + struct.pack("<I", 10), "value of 'abcdef'"),
    "huge string": (gguf_bytes({"a": Raw(8, struct.pack("<Q", HUGE))}), "value of 'a'"),
    "non-UTF-8 string": (gguf_bytes({"a": Raw(8, string(b"\xc3("))}), "not UTF-8"),
    "no truth value": (gguf_bytes({"a": Raw(7, b"\2")}), "truth value of 2"),
    "no truth values": (gguf_bytes({"a": array(7, 3, b"\0\1\2")}), "truth value of 2"),
    "huge array": (gguf_bytes({"a": array(4, HUGE)}), f"array 'a' of {HUGE} items"),
    "array whose bytes overflow": (gguf_bytes({"a": array(10, 1 << 61)}), "past the end"),
    "array beyond the file": (gguf_bytes({"a": array(4, 9, bytes(32))}), "past the end"),
    "unknown item type": (gguf_bytes({"a": array(13, 1, bytes(8))}), "unknown item type 13"),
    "nested arrays": (gguf_bytes({"a": array(9, 1, struct.pack("<IQ", 4, 0))}), "array of arrays in 'a'"),
    "huge string array": (gguf_bytes({"a": array(8, HUGE)}), "strings in 'a'"),
    "string array beyond the file": (gguf_bytes({"a": array(8, 99, bytes(64))}), "99 strings in 'a'"),
    "string in array beyond the file": (
        gguf_bytes({"a": array(8, 2, string("xyz") + struct.pack("<Q", 99))}),
        "string 1 of 2 in 'a'",
    ),
    "string in array with a huge length": (
        gguf_bytes({"a": array(8, 2, struct.pack("<Q", HUGE) + bytes(64))}),
        "string 0 of 2 in 'a'",
    ),
    "string array cut in a length": (
        gguf_bytes({"a": array(8, 2, string("abcdefghijkl") + b"\1")}),
        "string 1 of 2",
    ),
    "alignment 0": (gguf_bytes({"general.alignment": 0}), "alignment 0; a power of two"),
    "alignment 48": (gguf_bytes({"general.alignment": 48}), "alignment 48; a power of two"),
    "huge alignment": (gguf_bytes({"general.alignment": 1 << 62}), "a power of two"),
    "alignment as text": (gguf_bytes({"general.alignment": "32"}), "a power of two"),
    "alignment as array": (gguf_bytes({"general.alignment": np.arange(99)}), "an array of 99 items"),
    "no dimensions": (one_tensor(()), "0 dimensions"),
    "five dimensions": (one_tensor((1, 1, 1, 1, 1)), "5 dimensions"),
    "huge number of dimensions": (
        head(tensors=1) + string("w") + struct.pack("<I", 2**32 - 1) + bytes(64),
        "4294967295 dimensions",
    ),
    "empty dimension": (one_tensor((4, 0)), "impossible shape (4, 0)"),
    "element count overflows": (one_tensor((2**32, 2**32)), "impossible shape"),
    "element count overflows to little": (one_tensor((2**63 + 2, 2, 2**62, 4)), "impossible shape"),
    "element count of a foreign type overflows": (one_tensor((2**32, 2**32), 77), "impossible shape"),
    "rows that end inside a block": (one_tensor((48,), 2), "Q4_0 needs multiples of 32"),
    "rows that end inside a block, product fits": (one_tensor((128, 2), 12), "Q4_K needs multiples of 256"),
    "data past the end": (one_tensor((2048,)), "tensor 'w' ends at byte"),
    "offset past the end": (one_tensor((4,), 0, 1 << 40), "tensor 'w' ends at byte"),
    "offset overflows": (one_tensor((4,), 0, 2**64 - 32), "tensor 'w' ends at byte"),
    "foreign type past the end": (one_tensor((4,), 77, 1 << 20), "tensor 'w' ends at byte"),
    "misaligned offset": (one_tensor((4,), 0, 4), "not aligned to 32"),
    "offset misaligned for the file": (
        gguf_bytes({"general.alignment": 64}, {"a": ONES, "b": ONES}),
        "not aligned to 64",
    ),
    "duplicate tensors": (gguf_bytes({}, [("w", ONES), ("w", ONES)]), "'w' twice"),
    "overlapping tensors": (
        gguf_bytes({}, {"a": np.ones(16, np.float32), "b": np.ones(16, np.float32)}, offsets={"b": 32}),
        "tensors 'a' and 'b' overlap",
    ),
    "tensors at one place": (
        gguf_bytes({}, {"a": ONES, "b": np.ones(9, np.float32)}, offsets={"b": 0}),
        "tensors 'a' and 'b' overlap",
    ),
    "foreign type inside another tensor": (
        gguf_bytes({}, {"a": np.ones(16, np.float32), "b": Blocks(77, (1,), b"")}, offsets={"b": 32}),
        "tensors 'a' and 'b' overlap",
    ),
    "non-UTF-8 tensor name": (gguf_bytes({}, [(b"\xff", ONES)]), "a tensor name is not UTF-8"),
    "index cut": (head(tensors=1) + string("w" * 30) + struct.pack("<I", 1), "dimensions of tensor"),
}


@pytest.mark.parametrize("data, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(bad, data, words):
    assert words in bad(data)


def test_every_truncation_is_refused_or_harmless(tmp_path):
    weights = {"a": ONES, "b": random_tensor(np.random.default_rng(0), "Q4_0", 1, 32)}
    metadata = {"x": 1, "y": [b"one", b"two"], "z": np.arange(3), "s": "text", "t": True}
    whole = gguf_bytes(metadata, weights)
    path = tmp_path / "cut.gguf"
    end = open_gguf(write_gguf(path, metadata, weights)).tensors["b"]
    needed = end.offset + end.nbytes
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < needed:
            assert refusal(path)
        else:
            assert list(open_gguf(path).tensors) == ["a", "b"]


def test_messages_stay_short_whatever_the_file_says(bad):
    key, text = "k" * 60000, "v" * 100000
    assert len(bad(gguf_bytes([(key, text), (key, text)]))) < 500
    assert len(bad(gguf_bytes({"general.alignment": text}))) < 500
    assert len(bad(gguf_bytes({"general.alignment": [b"x"] * 10000}))) < 500
    assert bad(gguf_bytes([("\x1b[31m", 1), ("\x1b[31m", 1)])).isprintable()


def test_limits_bound_what_a_large_hostile_file_costs(tmp_path):
    path = tmp_path / "large.gguf"
    with open(path, "wb") as file:
        # A sparse file: a header that claims more than any model has, and the bytes to back it.
        file.write(head(keys=1) + string("a") + struct.pack("<IIQ", 9, 8, 1 << 24))
        file.truncate(2 * MAX_HEADER_BYTES)
    assert "2097152 are possible" in refusal(path)
    with open(path, "r+b") as file:
        file.write(head(keys=1) + string("a") + struct.pack("<IIQ", 9, 0, MAX_HEADER_BYTES))
    assert "128 MiB, the longest header allowed" in refusal(path)


def test_a_string_array_may_be_as_long_as_the_file(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a": array(8, 3, string("x" * 300) + string("") + string(b"\0" * 20))})
    assert open_gguf(path).metadata["a"] == [b"x" * 300, b"", b"\0" * 20]


def test_mutated_files_open_or_are_refused_in_one_sentence(tmp_path):
    tally, findings = fuzz(1500, 7, tmp_path, measure_memory=False)
    assert not findings, findings[0]
    assert tally["opened"] > 100 and tally["refused"] > 700


def test_mutated_files_take_little_memory(tmp_path):
    _, findings = fuzz(150, 8, tmp_path)
    assert not findings, findings[0]


# -- real files -------------------------------------------------------------------


def test_a_real_vocabulary_equals_that_of_an_independent_reader(shared):
    path = shared / "vocab" / "ggml-vocab-llama-spm.gguf"
    file, reference = open_gguf(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert set(file.metadata) == set(fields)
    for key, field in fields.items():
        mine, theirs = file.metadata[key], field.contents()
        if isinstance(theirs, list) and isinstance(theirs[0], str):
            assert [text.decode() for text in mine] == theirs
        else:
            assert np.array_equal(mine, theirs)


def test_a_real_file_of_version_2_opens(shared):
    file = open_gguf(shared / "vocab" / "ggml-vocab-aquila.gguf")
    assert file.version == 2
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"][100:103] == ["¦".encode(), "§".encode(), "¨".encode()]


@pytest.mark.parametrize("name", ["llama-bpe", "gemma-4"])
def test_large_vocabularies_open_completely(shared, name):
    file = open_gguf(shared / "vocab" / f"ggml-vocab-{name}.gguf")
    tokens, merges = (file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    assert (len(tokens), len(merges)) == {"llama-bpe": (128256, 280147), "gemma-4": (262144, 514906)}[name]
    assert len(file.metadata["tokenizer.ggml.token_type"]) == len(tokens)
    assert not file.tensors


def test_real_models_have_the_tensors_of_an_independent_reader(shared):
    for path in sorted((shared / "golden").glob("*.gguf")):
        file = open_gguf(path)
        reference = gguf.GGUFReader(path).tensors
        assert list(file.tensors) == [tensor.name for tensor in reference]
        for theirs in reference:
            mine = file.tensors[theirs.name]
            assert (mine.type, mine.shape) == (theirs.tensor_type, tuple(theirs.shape.tolist()[::-1]))
            assert (mine.offset, mine.nbytes) == (theirs.data_offset, theirs.n_bytes)
