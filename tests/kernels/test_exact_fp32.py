"""What promises fp32 takes no TF32, whatever was set before and by which of torch's interfaces."""

import threading

import pytest
import torch

from beit_fast.kernels.conv import conv
from beit_fast.kernels.conv.pixels import conv_pixels
from beit_fast.kernels.exact_fp32 import exact_fp32
from beit_fast.kernels.head.linear_argmax import linear_argmax
from products import note_precisions, precisions

CONV, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul


def others():
    """What the older interface sets as well."""
    return torch.backends.cudnn.rnn.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def legacy():
    """What the older interface answers, or that it refuses."""
    found = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("mixed")
    return found


def by_default():
    """cuDNN's TF32 is on."""


def by_the_older_interface():
    torch.set_float32_matmul_precision("high")


def by_the_newer_interface():
    MATMUL.fp32_precision = "tf32"


def all_by_the_newer_interface():
    torch.backends.fp32_precision = "tf32"
    MATMUL.fp32_precision = "tf32"


def all_inherited():
    torch.backends.fp32_precision = "tf32"


def products_by_their_older_switch():
    MATMUL.allow_tf32 = True


def nothing_allowed():
    torch.backends.cudnn.allow_tf32 = False


SETTINGS = (
    by_default,
    by_the_older_interface,
    by_the_newer_interface,
    all_by_the_newer_interface,
    all_inherited,
    products_by_their_older_switch,
    nothing_allowed,
)


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting.__name__)
def setting(request):
    before = precisions()
    request.param()
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    CONV.fp32_precision, MATMUL.fp32_precision = before
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_nothing_is_tf32_within_and_all_is_as_before_after_it(setting):
    before = precisions(), others(), legacy()
    assert ("tf32" in before[0]) == (setting is not nothing_allowed)
    with exact_fp32():
        assert "tf32" not in precisions()
        with exact_fp32():
            assert "tf32" not in precisions()
        assert "tf32" not in precisions()
    assert (precisions(), others(), legacy()) == before
    with pytest.raises(KeyError), exact_fp32():
        raise KeyError
    assert (precisions(), others(), legacy()) == before


def test_products_are_asked_for_by_one_interface_within(setting):
    """torch's profiler reads the older switch at every operator, and a mixture raises."""
    refused = legacy()[0] == "mixed"
    with exact_fp32():
        assert refused or MATMUL.allow_tf32 is False


def test_cudnns_older_switch_is_read_and_set_within_by_default():
    with exact_fp32():
        assert torch.backends.cudnn.allow_tf32 is False
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
            pass


@pytest.mark.parametrize("setting", [all_inherited], indirect=True)
def test_what_was_inherited_follows_its_source_after_the_block(setting):
    with exact_fp32():
        pass
    assert MATMUL.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert MATMUL.fp32_precision == "ieee"


def test_a_block_that_ends_first_leaves_another_threads_exact():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with exact_fp32():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    before = precisions()
    thread.start()
    assert entered.wait(10)
    with exact_fp32():
        leave.set()
        thread.join(10)
        assert "tf32" not in precisions()
    assert precisions() == before


def operators():
    x, weight, bias = torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3, 8), torch.zeros(8)
    pixels = torch.randint(256, (1, 4, 4, 3), dtype=torch.uint8)
    colours = torch.randn(8, 3, 3, 3)
    rows, scores = torch.randn(5, 8), torch.randn(6, 8)
    added = torch.randn(1, 4, 4, 8)
    return {
        "conv": lambda: conv(x, weight, bias, backend="torch"),
        "conv added": lambda: conv(x, weight, bias, added, overwrite=True, backend="torch"),
        "conv_pixels": lambda: conv_pixels(pixels, colours, bias, backend="torch"),
        "linear_argmax": lambda: linear_argmax(rows, scores, backend="torch"),
    }


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_tokenizers_operators_multiply_fp32_exactly(name, compiled, monkeypatch):
    """Compiled in one graph too: they are opaque to the compiler."""
    seen = note_precisions(monkeypatch)
    run = operators()[name]
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    before = precisions()
    assert before[0] == "tf32"
    run()
    assert seen
    assert not any("tf32" in found for found in seen)
    assert precisions() == before
