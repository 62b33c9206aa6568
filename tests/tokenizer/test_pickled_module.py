import os
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from beit_fast.tokenizer.pickled_module import read_pickled_module

pytestmark = pytest.mark.promise("S2")

SEQUENTIAL, LINEAR = "torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"
NUM_DAMAGED = 300
RELU = "torch.nn.modules.activation.ReLU"
CLASSES = frozenset({SEQUENTIAL, LINEAR, RELU})


@pytest.fixture
def module():
    return nn.Sequential(OrderedDict(first=nn.Linear(5, 4), relu=nn.ReLU(), last=nn.Linear(4, 3)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "module.pkl"


class Evil:
    """Unpickles to the exit code of a command that leaves a marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def refused(path, message):
    with pytest.raises(ValueError, match=message) as info:
        read_pickled_module(path, CLASSES)
    assert str(path) in str(info.value)


def test_a_module_is_read_with_its_names_shapes_and_values(module, save, path):
    save(module, path)
    read_module, read = read_pickled_module(path, CLASSES)
    assert read_module.class_name == SEQUENTIAL
    assert [name for name, _ in read_module.modules()] == ["", "first", "relu", "last"]
    assert read_module.children["last"].attributes["in_features"] == 4
    assert read_module.children["first"].tensors["weight"].shape == (4, 5)
    tensors = read()
    assert tensors.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def test_a_parameter_that_is_part_of_a_larger_storage_is_read_alone(module, save, path):
    flat = torch.arange(100.0)
    module.first.weight = nn.Parameter(flat[10:30].view(4, 5))
    module.last.bias = nn.Parameter(flat[97:])
    save(module, path)
    tensors = read_pickled_module(path, CLASSES)[1]()
    assert tensors["first.weight"].flatten().tolist() == list(range(10, 30))
    assert tensors["last.bias"].tolist() == [97, 98, 99]


def test_code_in_the_file_is_refused_and_not_run(module, save, path, tmp_path):
    marker = tmp_path / "marker"
    module.last.extra = Evil(marker)
    for value in (Evil(marker), module, [Evil(marker)], {"a": Evil(marker)}):
        save(value, path)
        refused(path, "names '(posix|nt).system'")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_code_in_other_pickle_protocols_is_refused_and_not_run(path, tmp_path, protocol):
    marker = tmp_path / "marker"
    torch.save(Evil(marker), path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match="refused"):
        read_pickled_module(path, CLASSES)
    assert not marker.exists()


def test_a_class_that_is_not_listed_is_named(save, path):
    save(nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2)), path)
    refused(path, "'torch.nn.modules.linear.Bilinear'.*among the 3 classes")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.zeros(2)}, "a dict where a pickled module belongs"),
        (torch.zeros(2), "a StoredTensor where"),
        (nn.Sequential(nn.Linear(2, 2).double()), "DoubleStorage"),
        (nn.Sequential(nn.Linear(2, 2).bfloat16()), "BFloat16Storage"),
    ],
    ids=["state-dict", "tensor", "fp64", "bf16"],
)
def test_what_is_no_module_of_fp32_tensors_is_refused(value, message, save, path):
    save(value, path)
    refused(path, message)


def test_a_buffer_is_refused(module, save, path):
    module.first.register_buffer("steps", torch.zeros(1))
    save(module, path)
    refused(path, "has buffers: .*steps")


def test_a_tensor_with_gaps_is_refused(module, save, path):
    module.first.weight = nn.Parameter(torch.zeros(5, 4).t())
    save(module, path)
    refused(path, "strides")


def test_modules_nested_or_shared_beyond_reason_are_refused(save, path):
    module = nn.Sequential()
    for _ in range(40):
        module = nn.Sequential(module)
    save(module, path)
    refused(path, "deeper than 16")
    module = nn.Sequential()
    for _ in range(15):
        module = nn.Sequential(OrderedDict(a=module, b=module))  # 2^15 paths, 16 modules
    save(module, path)
    refused(path, "more than 10000 modules")


def test_a_module_that_contains_itself_is_refused(save, path):
    module = nn.Sequential()
    module.child = module
    save(module, path)
    refused(path, "deeper than 16")


def edit_archive(path, edit):
    """Rewrite the members of an archive: edit(name, content) -> content, None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if (edited := edit(name, content)) is not None:
                archive.writestr(name, edited)


def of_member(suffix, edit):
    return lambda name, content: edit(content) if name.endswith(suffix) else content


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of_member("/data/0", lambda content: None), "storage '0' of .* is missing"),
        (of_member("/data/0", lambda content: content[:-4]), "76 bytes where 20 fp32"),
        (of_member("/data/0", lambda content: content + bytes(4)), "84 bytes where 20 fp32"),
        (of_member("/data.pkl", lambda content: None), "0 data.pkl"),
        (of_member("/data.pkl", lambda content: content[:-1]), "refused"),
        (of_member("/data.pkl", lambda content: b"\x80\x02."), "damaged"),
        (of_member("/data.pkl", lambda content: b"\x80\x02K\x05K\x01R."), "calls 5"),
        (of_member("/data.pkl", lambda content: bytes(2**24 + 1)), "longer than"),
        (of_member("/byteorder", lambda content: b"big"), "big-endian"),
    ],
    ids=[
        "no-storage", "short", "long", "no-pickle", "cut-pickle", "empty-pickle", "calls-a-number",
        "long-pickle", "big-endian",
    ],
)  # fmt: skip
def test_an_archive_that_contradicts_itself_is_refused(module, path, edit, message):
    torch.save(module, path)
    edit_archive(path, edit)
    refused(path, message)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(module, path):
    module.first.weight = nn.Parameter(torch.zeros(200)[:20].view(4, 5))
    torch.save(module, path)
    # BININT1 4, BININT1 5 in a tuple: the shape of the weight becomes (204, 5).
    shape = b"K\x04K\x05\x86"
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        assert archive.read(name).count(shape) == 1
    edit_archive(path, of_member("/data.pkl", lambda c: c.replace(shape, b"K\xccK\x05\x86")))
    refused(path, r"first.weight \(204, 5\) reaches past its storage of 200")


def test_a_compressed_archive_is_refused(module, path):
    """So no member can unfold to more than the size of the file."""
    torch.save(module, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("module/data/9", bytes(10_000))
    refused(path, "compressed")


def test_a_flipped_bit_in_an_archive_is_noticed(module, path):
    torch.save(module, path)
    content = bytearray(path.read_bytes())
    content[content.find(module.last.weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    _, read = read_pickled_module(path, CLASSES)
    with pytest.raises(ValueError, match=r"damaged.*download it again"):
        read()


def test_files_cut_anywhere_are_refused(module, save, path):
    save(module, path)
    content = path.read_bytes()
    for length in [0, 1, 10, 100, *range(150, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"refused|is empty"):
            read_pickled_module(path, CLASSES)


def test_altered_files_are_read_or_refused_and_nothing_else(module, save, path):
    save(module, path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(NUM_DAMAGED):
        damaged = bytearray(content)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            position = int(torch.randint(len(content), (), generator=generator))
            damaged[position] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(damaged)
        try:
            read_pickled_module(path, CLASSES)[1]()
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0.3 * NUM_DAMAGED


def test_something_else_altogether_is_refused(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(path, "refused")
    with pytest.raises(FileNotFoundError):
        read_pickled_module(path.with_name("none"), CLASSES)
