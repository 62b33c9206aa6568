import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast.data.config import PHOTOGRAPHS
from beit_fast.data.views.config import SingleViewConfig
from beit_fast.data.views.single_view import single_view
from beit_fast.kernels._triton import A100, H100, interpreting, pretend
from beit_fast.kernels.head import linear_argmax
from beit_fast.tasks.sources import open_source
from beit_fast.tokenizer import frozen as module
from beit_fast.tokenizer.config import DvaeConfig
from beit_fast.tokenizer.dvae import Dvae, map_pixels
from beit_fast.tokenizer.frozen import PRECISIONS, FrozenTokenizer, fold_encoder, run_folded
from beit_fast.tokenizer.protocol import Tokenizer


@pytest.fixture
def photographs():
    """(4, 3, 64, 48) uint8, channels last in memory."""
    source, config = open_source(PHOTOGRAPHS), SingleViewConfig(size=64)
    views = [single_view(source.read(i), config, random.Random(i))[:, :48] for i in range(4)]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


@pytest.fixture
def wide(photographs):
    """A dVAE whose channels the kernels take, with biases, no code winning everywhere."""
    torch.manual_seed(1)
    dvae = Dvae(
        DvaeConfig(
            vocab_size=128,
            encoder_width=32,
            decoder_width=8,
            decoder_input_width=8,
            blocks_per_group=1,
        )
    )
    for name, parameter in dvae.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.uniform_(parameter, 0, 0.2)
    with torch.no_grad():
        dvae.encoder.blocks["output"]["conv"].b -= dvae.encoder(map_pixels(photographs)).mean(
            dim=(0, 2, 3)
        )
    return dvae.requires_grad_(False)


@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
def test_folding_is_exact(tiny, photographs, as_float):
    dvae = tiny.double()
    images = photographs.double() / 255 if as_float else photographs
    want = dvae.encoder.features(map_pixels(images, torch.float64)).permute(0, 2, 3, 1)
    features = run_folded(fold_encoder(dvae, torch.float64), images)
    torch.testing.assert_close(features, want, rtol=1e-12, atol=1e-12)


def test_it_is_a_tokenizer_and_its_dvae_stays_trainable_and_public(tiny, photographs):
    before = copy.deepcopy(tiny.state_dict())
    tokenizer = FrozenTokenizer(tiny, "bf16")
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.stride) == (24, 8)
    ids = tokenizer.encode(photographs)
    assert torch.equal(tokenizer.decode(ids), tiny.decode(ids))
    assert tiny.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(p.requires_grad for p in tiny.parameters())
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    assert torch.equal(tokenizer.encode(photographs), ids)  # its weights are its own


def test_full_precision_gives_the_tokens_of_the_dvae(wide, photographs):
    tokenizer = FrozenTokenizer(wide)
    want = wide.encode(photographs)
    assert len(want.unique()) > 10
    for images in (photographs, photographs.contiguous(), photographs.float() / 255):
        assert torch.equal(tokenizer.encode(images), want)
    index = torch.tensor([5, -1, 0, want.numel() - 1, 5], dtype=torch.int32)
    ids = tokenizer.encode(photographs, index)
    assert torch.equal(ids[index >= 0], want.flatten()[index[index >= 0]])
    assert ids[1] == -1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_full_precision_takes_no_tf32(wide, photographs, compiled, monkeypatch):
    """cuDNN's default is TF32; the switches are as they were when the tokens are there."""
    conv, matmul, seen = torch.backends.cudnn.conv, torch.backends.cuda.matmul, []

    def watch(function):
        def run(*args, **kwargs):
            seen.append((conv.fp32_precision, matmul.fp32_precision))
            return function(*args, **kwargs)

        return run

    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, watch(getattr(F, name)))
    encode = FrozenTokenizer(wide, "fp32", backend="torch").encode
    if compiled:
        torch._dynamo.reset()
        encode = torch.compile(encode, fullgraph=True, backend="aot_eager")
    torch.set_float32_matmul_precision("high")
    try:
        encode(photographs[:1, :, :16, :16])
        assert conv.fp32_precision == matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"
    assert len(seen) >= 2
    assert not any("tf32" in precisions for precisions in seen)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_changes_no_more_than_rounding(wide, photographs, precision):
    """Features no further from fp64's than those of eager in the same dtype."""
    dtype = PRECISIONS[precision][0]
    exact = copy.deepcopy(wide).double().encoder.features(map_pixels(photographs, torch.float64))
    with torch.autocast("cpu", dtype):
        theirs = wide.encoder.features(map_pixels(photographs)).double()
    tokenizer = FrozenTokenizer(wide, precision)
    ours = tokenizer.features(photographs).permute(0, 3, 1, 2).double()
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()
    ids, want = tokenizer.encode(photographs), wide.encode(photographs)
    assert (ids == want).double().mean() > (0.97 if precision == "fp16" else 0.85)


@pytest.mark.skipif(not interpreting(), reason="there the kernels are what runs anyway")
@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm_80", "sm_90"])
def test_the_kernels_give_the_features_of_the_library(wide, photographs, gpu, device):
    wide, images = wide.to(device), photographs[:1, :, :16, :24].to(device)
    with pretend(gpu):
        tokenizer = FrozenTokenizer(wide, "fp16", backend="triton")
        assert set(tokenizer.backends().values()) == {"triton"}
        features = tokenizer.features(images).float()
        ids = tokenizer.encode(images)
    library = FrozenTokenizer(wide, "fp16", backend="torch")
    assert set(library.backends().values()) == {"torch"}
    torch.testing.assert_close(features, library.features(images).float(), rtol=5e-3, atol=5e-3)
    assert torch.equal(ids, library.encode(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="these back ends are of GPUs")
@pytest.mark.parametrize("backend", ["triton", "cudnn", None])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gpu_gives_nearly_the_tokens_of_full_precision(wide, photographs, precision, backend):
    want = wide.encode(photographs)
    tokenizer = FrozenTokenizer(wide.to("cuda"), precision, backend=backend)
    ids = tokenizer.encode(photographs.cuda())
    assert (ids.cpu() == want).double().mean() > (0.97 if precision == "fp16" else 0.85)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
def test_encoding_can_be_captured_and_replayed_on_other_images(wide, photographs, backend):
    tokenizer = FrozenTokenizer(wide.to("cuda"), "fp16", backend=backend)
    images = photographs.cuda()
    index = torch.arange(0, 4 * 48, 3, dtype=torch.int32, device="cuda")
    static = images.clone()
    tokenizer.encode(static, index)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = tokenizer.encode(static, index)
    for batch in (images, images.flip(0)):
        static.copy_(batch)
        graph.replay()
        assert torch.equal(ids, tokenizer.encode(batch, index))


def test_what_runs_can_be_asked_by_the_names_of_the_dvae(wide):
    found = FrozenTokenizer(wide, backend="torch").backends()
    assert found.keys() == {
        name.removeprefix("blocks.").replace(".res_path", "")
        for name, layer in wide.encoder.named_modules()
        if isinstance(layer, module.Conv) and "output" not in name
    }
    assert set(found.values()) == {"torch"}


def test_autocast_changes_nothing(wide, photographs):
    tokenizer = FrozenTokenizer(wide)
    want = tokenizer.features(photographs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.features(photographs), want)


def test_the_weight_of_the_scores_is_split_once(tiny, photographs, monkeypatch):
    calls, split = [], linear_argmax.split_fp16

    def counted(weight):
        calls.append(weight.shape)
        return split(weight)

    for place in (module, linear_argmax):
        monkeypatch.setattr(place, "split_fp16", counted, raising=False)
    tokenizer = FrozenTokenizer(tiny, "fp16").to("cpu")
    for _ in range(3):
        tokenizer.encode(photographs)
    assert len(calls) == 1


def test_an_empty_batch_has_no_tokens(tiny):
    images = torch.empty(0, 3, 16, 24, dtype=torch.uint8)
    assert FrozenTokenizer(tiny).encode(images).shape == (0, 2, 3)


def test_what_does_not_fit_is_explained(tiny, wide):
    with pytest.raises(ValueError, match="'tf32': pass one of fp32, fp16, bf16"):
        FrozenTokenizer(tiny, "tf32")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here.*float32"):
        FrozenTokenizer(wide, "fp32", backend="triton")
    with pytest.raises(ValueError, match="permute"):
        FrozenTokenizer(tiny).encode(torch.zeros(1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"multiples of 8.*16 x 16"):
        FrozenTokenizer(tiny).encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="int32"):
        FrozenTokenizer(tiny).encode(torch.zeros(1, 3, 16, 16, dtype=torch.int32))
