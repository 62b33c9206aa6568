"""A file of weights that travels alone is what was saved, or it is refused."""

import json
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from beit_fast.seal import (
    DIGEST_KEY,
    KIND_KEY,
    UNSEALED,
    check_seal,
    replace_safetensors,
    seal,
)
from beit_fast.weights.files import read_weights, write_weights
from damaged import flipped

pytestmark = pytest.mark.promise("R5")

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
TENSORS |= {"none": torch.empty(0, 4), "one": torch.tensor(7), "yes": torch.tensor([True, False])}


def write(path, tensors=TENSORS, **metadata):
    replace_safetensors(path, save(tensors, {"format": "pt", **metadata, **UNSEALED}))
    return path


def read(path):
    check_seal(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def save_again(path, tensors, metadata):
    """As a tool does it that keeps the metadata."""
    save_file(tensors, path, metadata)


def test_what_is_sealed_is_read_by_all(tmp_path):
    path = write(tmp_path / "w.safetensors", said="ä \u2028 😀")
    tensors, metadata = read(path)
    assert metadata.keys() == {"format", "said", KIND_KEY, DIGEST_KEY}
    assert metadata[DIGEST_KEY] != UNSEALED[DIGEST_KEY]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_every_single_bit_is_seen(tmp_path):
    path = write(tmp_path / "w.safetensors", crop="0.875")
    refused = 0
    for place in range(path.stat().st_size):
        for bit in range(8):
            with flipped(path, place, bit), pytest.raises((ValueError, SafetensorError)):
                read(path)
            refused += 1
    assert refused == 8 * path.stat().st_size > 3000
    read(path)


@pytest.mark.parametrize("gone", [KIND_KEY, DIGEST_KEY])
def test_half_a_seal_is_damage(tmp_path, gone):
    path = write(tmp_path / "w.safetensors")
    tensors, metadata = read(path)
    save_again(path, tensors, {key: text for key, text in metadata.items() if key != gone})
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: of the two keys .* only"):
        check_seal(path)


def test_a_seal_of_a_later_version_is_named(tmp_path):
    path = write(tmp_path / "w.safetensors")
    tensors, metadata = read(path)
    save_again(path, tensors, metadata | {KIND_KEY: "2"})
    with pytest.raises(ValueError, match=r"has a seal of kind '2', this version checks '1'"):
        check_seal(path)


def test_a_change_on_purpose_is_told_what_to_do_and_that_does_it(tmp_path):
    path = write(tmp_path / "w.safetensors", said="more")
    tensors, metadata = read(path)
    save_again(path, tensors, metadata)  # nothing was changed
    check_seal(path)
    changed = {name: tensor + 1 if name == "a" else tensor for name, tensor in tensors.items()}
    save_again(path, changed, metadata)
    remedy = rf"is damaged: its content has .* save it without {KIND_KEY} and {DIGEST_KEY} in its"
    with pytest.raises(ValueError, match=remedy):
        read_weights(path)
    # As the message has it.
    save_again(
        path, changed, {k: v for k, v in metadata.items() if k not in (KIND_KEY, DIGEST_KEY)}
    )
    assert torch.equal(read_weights(path).tensors["a"], changed["a"])
    # Written by us it has a seal of what it holds now.
    write_weights(path, changed, metadata=metadata)
    check_seal(path)
    assert torch.equal(load_file(path)["a"], changed["a"])
    save_again(path, tensors, read(path)[1])
    with pytest.raises(ValueError, match="is damaged"):
        read_weights(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_files_without_a_seal_are_read_as_they_are(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "w.safetensors", metadata)
    check_seal(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"no safetensors file")
    check_seal(tmp_path / "w.safetensors")


def test_tensors_may_lie_in_another_order(tmp_path):
    path = write(tmp_path / "w.safetensors")
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data, end, parts = json.loads(content[8 : 8 + size]), content[8 + size :], 0, []
    for name in reversed([name for name in header if name != "__metadata__"]):
        begin, after = header[name]["data_offsets"]
        parts.append(data[begin:after])
        header[name]["data_offsets"] = [end, end + after - begin]
        end += after - begin
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    assert path.read_bytes()[8 + len(text) :] != data
    assert torch.equal(read(path)[0]["a"], TENSORS["a"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda header: header.pop("a"), "its tensors take|gaps"),
        (lambda header: header["a"].pop("dtype"), "KeyError: 'dtype'"),
        (lambda header: header.update(a=[]), "TypeError"),
        (lambda header: header["a"].update(data_offsets=["x", 1]), "TypeError"),
        (lambda header: header.update(c=header["a"]), "gaps"),
        (lambda header: header["one"].update(data_offsets=[0, 2**70]), "gaps"),
    ],
)
def test_a_sealed_file_with_a_lying_header_is_refused_by_name(tmp_path, change, why):
    path = write(tmp_path / "w.safetensors")
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(ValueError, match=rf"w\.safetensors is not a whole .*({why})"):
        check_seal(path)


def test_metadata_are_in_one_order_whatever_the_names(tmp_path):
    tensors = {"weight": torch.arange(6.0), 'a "name"\\ of\nä': torch.ones(2, dtype=torch.bfloat16)}
    said = {"z": "1", 'ü "quoted"\t': "\\ \x7f\u2028 😀", **{f"key {n}": str(n) for n in range(20)}}
    written = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata=said | UNSEALED)
        with path.open("rb+") as file:
            seal(file, lambda name, *_: [tensors[name].view(torch.uint8).numpy()])
        written.add(path.read_bytes())
        found, metadata = read(path)
        assert {key: metadata[key] for key in said} == said
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(written) == 1
