"""Blocks as models run them: what `layers.Block` says, by other work."""

import copy
import functools

import pytest
import torch
from torch import nn

from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.kernels.residual.drop_path import KeptSamples
from beit_fast.model import fused
from beit_fast.model.beit import Beit
from beit_fast.model.fused import FusedBlock, run_blocks, select_rows
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.layers import Block

IMAGES = (3, 3, 32, 32)
B, GRID, ROWS = 6, (3, 5), torch.tensor([7, 0, 40, -1, 95, 7], dtype=torch.int32)
MODELS = {
    "shared-table": {},
    "own-tables": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False},
    "both": {"use_rel_pos_bias": True},
    "bare": {"use_shared_rel_pos_bias": False, "init_values": None, "qkv_bias": False},
}
PATHS = {
    "eval": {"drop_path_rate": 0.5},
    "train": {},
    "drop-path": {"drop_path_rate": 0.5},
    "compact": {"drop_path_rate": 0.5, "drop_path_compact": True},
}


@pytest.fixture
def with_kernels(monkeypatch, device):
    """Residuals and norms of whole models by the Triton kernels, with tensors where these run."""

    def switch(on=True):
        for function in (scale_residual, scale_residual_norm, layer_norm):
            called = functools.partial(function, backend="triton") if on else function
            monkeypatch.setattr(fused, function.__name__, called)

    with device:
        yield switch


def outputs_and_gradients(model, images, gradients, function=None, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    out = (function or model)(images)
    out.square().mean().backward()
    return {"out": out, **gradients(model)}


def results_of(run, blocks, x, shared_bias):
    """What a function of them gives, and all gradients."""
    leaves = dict(blocks.named_parameters())
    leaves |= {"x": x} | ({} if shared_bias is None else {"shared_bias": shared_bias})
    out = run(blocks, x, shared_bias)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"out": out} | dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all-rows", "listed-rows"])
@pytest.mark.parametrize("grid", [None, GRID], ids=["own-grid", "other-grid"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", MODELS)
def test_output_and_gradients_are_the_specifications(
    tiny, randomize, monkeypatch, kind, path, grid, rows
):
    config = tiny(depth=3, **MODELS[kind], **PATHS[path])
    model = randomize(Beit(config)).double().train(path != "eval")
    height, width = config.grid if grid is None else grid
    N = height * width + 1
    x = torch.randn(B, N, 32, dtype=torch.float64, requires_grad=True)
    bias = None
    if config.use_shared_rel_pos_bias:
        bias = torch.randn(4, N, N, dtype=torch.float64, requires_grad=True)

    def listed(out):
        return out if rows is None else out[rows >= 0]  # nobody reads what stands for -1

    drawn, draw = [], FusedBlock._path
    with monkeypatch.context() as patch:
        patch.setattr(FusedBlock, "_path", lambda *a: drawn.append(draw(*a)) or drawn[-1])
        torch.manual_seed(1)
        ours = results_of(lambda *a: listed(run_blocks(*a, grid, rows)), model.blocks, x, bias)
    assert len(drawn) == 2 * 3
    if path == "compact":  # it draws otherwise: the same samples by factor
        keeps = iter([d.kept and (d.kept.slots >= 0) * d.kept.scale for d in drawn])
        monkeypatch.setattr(Block, "draw_keep", lambda self, x: next(keeps))

    def specified(blocks, x, shared_bias):
        for block in blocks:
            x = Block.forward(block, x, shared_bias, grid)
        return listed(x if rows is None else select_rows(x, rows))

    torch.manual_seed(1)
    for name, expected in results_of(specified, model.blocks, x, bias).items():
        allowed = 1e-12 * expected.abs().max()
        assert (ours[name] - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["train", "drop-path"])
def test_in_bf16_it_is_no_further_from_fp64_than_the_specification(tiny, randomize, rate):
    block, x = randomize(FusedBlock(tiny(), rate)), torch.randn(B, 17, 32)

    def both(block, x):
        found = []
        for forward in (FusedBlock.forward, Block.forward):
            torch.manual_seed(1)
            found.append(forward(block, x))
        return found

    _, exact = both(copy.deepcopy(block).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = both(block, x)
    in_bf16 = both(block.bfloat16(), x.bfloat16())
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    for pair, dtype in ((by_autocast, torch.float32), (in_bf16, torch.bfloat16)):
        ours, theirs = ((out - exact).abs().max() for out in pair)
        assert ours <= 2 * theirs + rounding
        assert [out.dtype for out in pair] == [dtype, dtype]


def test_the_norms_are_fused_into_the_residuals_before_them(tiny, monkeypatch):
    calls = []
    for function in (scale_residual, scale_residual_norm, layer_norm):
        name = function.__name__
        monkeypatch.setattr(
            fused,
            name,
            lambda *a, _call=function, _name=name, **k: calls.append(_name) or _call(*a, **k),
        )
    model = Beit(tiny(depth=3))
    model(torch.randn(IMAGES))
    assert calls == ["layer_norm", *["scale_residual_norm"] * 5, "scale_residual"]
    calls.clear()
    model.set_grad_checkpointing()
    model(torch.randn(IMAGES))
    assert calls == 3 * ["layer_norm", "scale_residual_norm", "scale_residual"]


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1", "blocks.0.norm1", "blocks.1.norm1",
                                  "blocks.0.norm2", "blocks.2.norm2"])  # fmt: skip
@pytest.mark.parametrize("config", [{}, {"drop_path_compact": True}], ids=["plain", "compact"])
def test_hooks_on_blocks_and_norms_see_what_they_would_see_unfused(
    tiny, randomize, gradients, assert_agree, name, config
):
    model = randomize(Beit(tiny(depth=3, drop_path_rate=0.5, **config)))
    images = torch.randn(IMAGES)
    expected = outputs_and_gradients(model, images, gradients)
    seen = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda module, arguments, out: seen.append((arguments[0], out)))
    assert_agree(outputs_and_gradients(model, images, gradients), expected)
    ((x, out),) = seen
    if isinstance(module, nn.LayerNorm):
        affine = (module.normalized_shape, module.weight, module.bias, module.eps)
        torch.testing.assert_close(out, nn.functional.layer_norm(x, *affine))
    handle = module.register_forward_hook(lambda module, arguments, out: torch.zeros_like(out))
    assert not torch.allclose(model(images), expected["out"])
    handle.remove()


def test_a_block_that_is_replaced_is_called_as_it_is(tiny, randomize):
    class Doubled(nn.Module):
        def forward(self, x, shared_bias):
            return 2 * x

    model = randomize(Beit(tiny(depth=3))).eval()
    images = torch.randn(IMAGES)
    blocks = list(model.blocks)
    model.blocks[1] = Doubled()
    bias = model.rel_pos_bias()
    expected = blocks[2](2 * blocks[0](model._embed(images, None), bias), bias)
    torch.testing.assert_close(model(images), expected)


def test_compact_drop_path_is_drop_path_with_a_fixed_number(tiny, randomize, monkeypatch):
    B, rate = 6, 0.4
    block = randomize(FusedBlock(tiny(drop_path_compact=True), rate)).double()
    plain = randomize(Block(tiny(), rate)).double()
    plain.load_state_dict(block.state_dict())
    draws, sizes = [], []
    draw = fused.draw_kept_samples
    monkeypatch.setattr(fused, "draw_kept_samples", lambda *a: draws.append(draw(*a)) or draws[-1])
    for module in (block.attn.proj, block.mlp.fc1):
        module.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    x = torch.randn(B, 17, 32, dtype=torch.float64)
    out = block(x, None)
    assert sizes == [4, 4]  # round(6 * 0.6): the others are not computed
    keeps = iter([(d.slots >= 0) * (B / 4) for d in draws])
    monkeypatch.setattr(plain, "draw_keep", lambda x: next(keeps))
    torch.testing.assert_close(out, plain(x, None))


def test_compact_drop_path_draws_in_training_alone_and_only_where_it_drops(tiny, monkeypatch):
    draws = []
    draw = fused.draw_kept_samples
    monkeypatch.setattr(fused, "draw_kept_samples", lambda *a: draws.append(draw(*a)) or draws[-1])
    config = tiny(depth=3, drop_path_rate=0.5, drop_path_compact=True)
    model = Beit(config)
    images = torch.randn(4, 3, 32, 32)
    model(images)
    assert [len(d.samples) for d in draws] == [3, 3, 2, 2]  # rates 0, 0.25, 0.5
    assert all(isinstance(d, KeptSamples) for d in draws)
    assert not all(torch.equal(draws[0].samples, d.samples[:3]) for d in draws[1:])
    draws.clear()
    model.eval()(images)
    assert not draws


def test_compact_drop_path_trains_the_same_compiled_and_checkpointed(
    tiny, randomize, gradients, assert_agree
):
    model = randomize(Beit(tiny(depth=3, drop_path_rate=0.5, drop_path_compact=True)))
    images = torch.randn(4, 3, 32, 32)
    expected = outputs_and_gradients(model, images, gradients)
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    assert_agree(outputs_and_gradients(model, images, gradients, compiled), expected)
    model.set_grad_checkpointing()
    assert_agree(outputs_and_gradients(model, images, gradients), expected)


def test_no_mode_needs_a_value_on_the_host(tiny):
    # The meta device has shapes and no values.
    fields = {"drop_path_rate": 0.5, "drop_path_compact": True}
    with torch.device("meta"):
        assert Beit(tiny(**fields))(torch.randn(IMAGES)).shape == (3, 17, 32)


def test_an_empty_batch_and_a_single_image_go_through_every_mode(tiny):
    fields = {"drop_path_rate": 0.5, "drop_path_compact": True}
    model = Beit(tiny(**fields))
    for B in (0, 1):
        out = model(torch.randn(B, 3, 32, 32))
        out.sum().backward()
        assert out.shape == (B, 17, 32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"drop_path_rate": 0.4},
        {"drop_path_rate": 0.4, "drop_path_compact": True},
    ],
    ids=["BEiT+", "drop-path", "compact"],
)
def test_the_kernels_give_the_models_gradients(
    tiny, randomize, gradients, assert_agree, with_kernels, fields
):
    model = randomize(BeitForImageClassification(tiny(**fields)))
    images = torch.randn(4, 3, 32, 32)
    expected = outputs_and_gradients(model, images, gradients)
    with_kernels()
    assert_agree(outputs_and_gradients(model, images, gradients), expected)


def losses_of_twenty_steps(model):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        images = torch.randn(2, 3, 16, 16, generator=generator)
        mask = torch.rand(2, 4, generator=generator) < 0.5
        tokens = (images.unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)) > 0).long().flatten(1)
        loss, _ = model.loss(images, mask, torch.arange(8, dtype=torch.int32), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_tiny_beit_trained_twenty_steps_with_kernels_and_with_torch_agrees(tiny, with_kernels):
    config = tiny(img_size=16, depth=2, vocab_size=8, drop_path_rate=0.3)
    model = BeitForMaskedImageModeling(config)
    expected = losses_of_twenty_steps(copy.deepcopy(model))
    assert expected[-1] < 0.6 * expected[0]
    with_kernels()
    losses = losses_of_twenty_steps(copy.deepcopy(model))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
