"""safetensors headers that lie, in each place where one is read: the documented error, soon, in
little memory, or the tensors as they are."""

import copy
import hashlib
import json
import random
import resource
import time

import pytest
import torch
from safetensors.torch import save

from beit_fast.seal import UNSEALED
from beit_fast.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.state import load_checkpoint, save_checkpoint
from beit_fast.weights.files import read_weights
from beit_fast.weights.read import read_checkpoint
from tiny_classifier import tiny_classifier

pytestmark = pytest.mark.promise("S3")
MUTATIONS = {"weights": 800, "tokenizer": 600, "checkpoint": 600}
NAMES = ["__class__", "__init__", "forward", "a.__dict__", "", ".", "../x", "\0", "é" * 300]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 2**64, 2**200, 1.5, True, None, "8", [], {}]
DTYPES = ["F64", "F16", "BF16", "BOOL", "F8_E4M3", "C64", "f32", "", None, 3, "object"]


def split(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: object, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def mutate(content: bytes, chance: random.Random) -> bytes:
    """One lie: of a name, type, shape or place, of the header's size or form, or in its text."""
    header, data = split(content)
    header = copy.deepcopy(header)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    entry = header[name]
    kind = chance.randrange(12)
    if kind == 0:
        header[chance.choice(NAMES)] = header.pop(name)
    elif kind == 1:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 2:
        place = chance.randrange(len(entry["shape"]) + 1)
        entry["shape"][place : place + chance.randrange(2)] = [chance.choice(NUMBERS)]
    elif kind == 3:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(NUMBERS)
    elif kind == 4:
        entry["data_offsets"] = header[other]["data_offsets"]  # two in one place
    elif kind == 5:
        entry["data_offsets"] = chance.choice([entry["data_offsets"][::-1], [], [0], [0, 1, 2], 7])
    elif kind == 6:
        entry.pop(chance.choice(list(entry)))
    elif kind == 7:
        wrong = [{"a": 1}, {"a": {"b": "c"}}, [], "text", {"format": "x" * 10**5}]
        header["__metadata__"] = chance.choice(wrong)
    elif kind == 8:
        return joined(header, data, size=chance.choice([0, 1, 2**16, 2**40, 2**62, 2**64 - 1]))
    elif kind == 9:
        return joined(chance.choice([[], 3, None, {}, b"[" * 5000, b'{"a":' * 5000]), data)
    elif kind == 10:
        text = bytearray(json.dumps(header).encode())
        for _ in range(chance.randrange(1, 4)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        return joined(bytes(text), data)
    else:
        data = data[: chance.randrange(len(data))] if chance.random() < 0.5 else data + b"more"
    return joined(header, data)


@pytest.fixture
def readers(tmp_path):
    """What reads, and what would be right: by name a function of the bytes, the bytes, the path."""
    sizes = {"encoder_width": 4, "decoder_width": 4, "decoder_input_width": 4}
    tokenizer = tmp_path / "tokenizer.safetensors"
    save_tokenizer(Dvae(DvaeConfig(vocab_size=8, blocks_per_group=1, **sizes)), tokenizer)
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    step = save_checkpoint(tmp_path, 1, {"model": tensors}, {"a": 1}, keep=1)
    manifest = {"format": 1, "step": 1, "settings": {}}

    def weights(content):
        (tmp_path / "w.safetensors").write_bytes(content)
        read_weights(tmp_path / "w.safetensors")

    def of_tokenizer(content):
        tokenizer.write_bytes(content)
        load_tokenizer(tokenizer)

    def checkpoint(content):
        (step / "model.safetensors").write_bytes(content)
        files = {"model.safetensors": hashlib.sha256(content).hexdigest()}  # whoever lies can count
        (step / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        load_checkpoint(step)

    plain = save(tensors)
    return {
        "weights": (weights, plain, tmp_path / "w.safetensors"),
        "tokenizer": (of_tokenizer, tokenizer.read_bytes(), tokenizer),
        "checkpoint": (checkpoint, plain, step / "model.safetensors"),
    }


@pytest.mark.parametrize("reader", MUTATIONS)
def test_a_header_that_lies_is_read_or_refused_by_name(reader, readers):
    read, right, path = readers[reader]
    if reader == "tokenizer":  # without the digest of its own, which would see it first
        header, data = split(right)
        for key in UNSEALED:
            del header["__metadata__"][key]
        right = joined(header, data)
    read(right)
    chance, said, slowest = random.Random(reader), [], 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS[reader]):
        content = mutate(right, chance)
        begun = time.process_time()
        try:
            read(content)
        except ValueError as error:
            said.append(str(error))
        slowest = max(slowest, time.process_time() - begun)
    assert [line for line in said if str(path) not in line or len(line) > 2000] == []
    assert len(said) > MUTATIONS[reader] // 2
    assert slowest < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 << 10  # KiB


@pytest.mark.parametrize("reader", ["weights", "tokenizer"])
def test_a_million_tensors_are_refused_before_they_are_parsed(reader, readers):
    read, _, path = readers[reader]
    entry = b':{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    names = b"".join(b'"t%d"%b' % (n, entry) for n in range(1_000_000))
    content = joined(b"{%b}" % names[:-1], b"")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"header claims \d{8} bytes") as error:
        read(content)
    assert str(path) in str(error.value)
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 << 10  # KiB


def test_names_of_attributes_are_foreign_and_set_nothing(tmp_path):
    state = tiny_classifier().state_dict()
    for name in ("__class__", "blocks.0.__class__", "forward", "head.__init__"):
        (tmp_path / "w.safetensors").write_bytes(save(state | {name: torch.zeros(2)}))
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / "w.safetensors")
