"""`skip_unread_rows`: the same loss and gradients, from less work in the last block."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_fast.kernels import _triton
from beit_fast.kernels.residual import layer_norm, scale_residual, scale_residual_norm
from beit_fast.model import fused, layers
from beit_fast.model.heads import BeitForMaskedImageModeling

B, L, V = 5, 16, 24

MODES = {
    "BEiT+": {},
    "vanilla": {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None},
    "own-tables": {"use_rel_pos_bias": True},
    "drop-path": {"drop_path_rate": 0.5},
    "compact": {"drop_path_rate": 0.5, "drop_path_compact": True},
}
modes = pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
MASKS = {
    "usual": [True, False, False, True, False] * 16,
    "none-hidden": [False] * (B * L),
    "all-hidden-in-two": [True] * (2 * L) + [False] * (3 * L),
}


def inputs(mask=MASKS["usual"], num_padding=5):
    """images, mask, masked_index (padded), visual_tokens."""
    mask = torch.tensor(mask).view(B, L)
    index = F.pad(mask.flatten().nonzero().flatten().int(), (0, num_padding), value=-1)
    return torch.randn(B, 3, 32, 32), mask, index, torch.randint(V, (B, L))


def pair(tiny, randomize, dtype=torch.float64, **fields):
    """A model that computes every row, and the same that does not."""
    plain = randomize(BeitForMaskedImageModeling(tiny(**fields))).to(dtype)
    skipping = BeitForMaskedImageModeling(tiny(**fields, skip_unread_rows=True)).to(dtype)
    skipping.load_state_dict(plain.state_dict(), strict=True)
    return plain, skipping


def loss_and_gradients(model, arguments, gradients, name="loss", seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    out = getattr(model, name)(*arguments)
    loss = out[0] if name == "loss" else out
    loss.backward()
    correct = {"correct": out[1].double()} if name == "loss" else {}
    return {"loss": loss.detach(), **correct, **gradients(model)}


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        allowed = 1e-12 * tensor.abs().max()
        assert (results[name] - tensor).abs().max() <= allowed, name


def rows_computed(model, arguments, monkeypatch):
    """How many rows each linear layer of the last block multiplies for a loss."""
    names = {id(p): name for name, p in model.blocks[-1].named_parameters()}
    seen, linear = {}, layers.linear

    def counted(x, weight, bias):
        if id(weight) in names:
            seen[names[id(weight)]] = x.shape[:-1].numel()
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "linear", counted)
        model.loss(*arguments)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@modes
def test_loss_and_all_gradients_are_the_same(tiny, randomize, gradients, fields, checkpointing):
    plain, skipping = pair(tiny, randomize, depth=3, **fields)
    images, *others = inputs()
    arguments = (images.double(), *others)
    expected = loss_and_gradients(plain, arguments, gradients)
    skipping.set_grad_checkpointing(checkpointing)
    assert_same(loss_and_gradients(skipping, arguments, gradients), expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("predict", ["tokens", "pixels"])
@pytest.mark.parametrize("depth", [1, 2])
def test_whatever_is_hidden_and_predicted(tiny, randomize, gradients, mask, predict, depth):
    fields = {"predict": predict, "depth": depth, "drop_path_rate": 0.5}
    plain, skipping = pair(tiny, randomize, **fields)
    images, *others = inputs(mask)
    arguments, name = (images.double(), *others), "loss"
    if predict == "pixels":
        arguments, name = arguments[:3], "pixel_loss"
    expected = loss_and_gradients(plain, arguments, gradients, name)
    assert_same(loss_and_gradients(skipping, arguments, gradients, name), expected)


@modes
def test_fp32_loses_no_more_than_computing_every_row(tiny, randomize, gradients, fields):
    plain, skipping = pair(tiny, randomize, torch.float32, **fields)
    images, *others = inputs()
    theirs, ours = (loss_and_gradients(m, (images, *others), gradients) for m in (plain, skipping))
    exact = loss_and_gradients(plain.double(), (images.double(), *others), gradients)
    for name, want in exact.items():
        rounding = torch.finfo(torch.float32).eps * want.abs().max()
        allowed = 2 * (theirs[name] - want).abs().max() + rounding
        assert (ours[name] - want).abs().max() <= allowed, name


def test_only_listed_rows_are_computed_after_the_last_attention(tiny, randomize, monkeypatch):
    plain, skipping = pair(tiny, randomize, torch.float32)
    images, mask, index, tokens = inputs()
    listed, every = len(index), B * (L + 1)
    assert listed < every / 2
    names = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    everywhere = dict.fromkeys(names, every)
    arguments = (images, mask, index, tokens)
    assert rows_computed(plain, arguments, monkeypatch) == everywhere
    expected = {**dict.fromkeys(names, listed), "attn.qkv.weight": every}
    assert rows_computed(skipping, arguments, monkeypatch) == expected
    # All patches are predicted: there is nothing to skip.
    arguments = (images, mask, torch.arange(B * L, dtype=torch.int32), tokens)
    assert rows_computed(skipping, arguments, monkeypatch) == everywhere


@modes
def test_padding_and_its_targets_change_nothing(tiny, randomize, gradients, fields):
    _, model = pair(tiny, randomize, **fields)
    images, mask, index, tokens = inputs(num_padding=0)
    listed = tokens.flatten()[index.long()]
    arguments = (images.double(), mask, index, listed)
    expected = loss_and_gradients(model, arguments, gradients)
    padded = (*arguments[:2], F.pad(index, (3, 4), value=-1), F.pad(listed, (3, 4), value=-1))
    assert_same(loss_and_gradients(model, padded, gradients), expected)


def test_a_patch_listed_twice_counts_twice(tiny, randomize, gradients):
    plain, skipping = pair(tiny, randomize)
    images, mask, _, tokens = inputs()
    arguments = (images.double(), mask, torch.tensor([3, 20, 20, -1]), tokens)
    expected = loss_and_gradients(plain, arguments, gradients)
    assert_same(loss_and_gradients(skipping, arguments, gradients), expected)


@pytest.mark.parametrize("name", ["attn", "attn.proj", "norm2", "mlp", "mlp.fc1", ""])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hook_in_the_last_block_sees_every_row_and_is_told_of(
    tiny, randomize, gradients, monkeypatch, name, checkpointing
):
    plain, skipping = pair(tiny, randomize)
    images, *others = inputs()
    arguments = (images.double(), *others)
    expected = loss_and_gradients(plain, arguments, gradients)
    skipping.set_grad_checkpointing(checkpointing)
    seen = []
    module = skipping.blocks[-1].get_submodule(name)
    module.register_forward_hook(lambda module, arguments, out: seen.append(out.shape[:2]))
    monkeypatch.setattr(_triton, "_warned", set())
    with pytest.warns(UserWarning, match="skip_unread_rows: the last block computes all rows"):
        results = loss_and_gradients(skipping, arguments, gradients)
    assert_same(results, expected)
    assert set(seen) == {(B, L + 1)}


def test_a_block_that_fsdp_gathers_skips_them_but_not_where_it_is_watched_too(
    tiny, randomize, gradients, monkeypatch
):
    """FSDP makes a class of its own of a block, and hooks it; tests/tasks has the real one."""

    def gather(block, arguments): ...

    gather.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    plain, skipping = pair(tiny, randomize)
    images, *others = inputs()
    arguments = (images.double(), *others)
    last = skipping.blocks[-1]
    last.__class__ = type("FSDPFusedBlock", (fused.FusedBlock,), {})
    last.register_forward_pre_hook(gather)
    expected = loss_and_gradients(plain, arguments, gradients)
    assert_same(loss_and_gradients(skipping, arguments, gradients), expected)
    rows = rows_computed(skipping, arguments, monkeypatch)
    assert (rows["attn.qkv.weight"], rows["mlp.fc1.weight"]) == (B * (L + 1), len(others[1]))

    last.register_forward_hook(lambda block, arguments, out: None)
    monkeypatch.setattr(_triton, "_warned", set())
    with pytest.warns(UserWarning, match="the last block computes all rows"):
        rows = rows_computed(skipping, arguments, monkeypatch)
    assert rows["mlp.fc1.weight"] == B * (L + 1)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_replaces_a_module_need_not_know_of_rows(
    tiny, randomize, monkeypatch, name, checkpointing
):
    class Twice(nn.Module):
        def forward(self, x, shared_bias):
            return 2 * x

    plain, skipping = pair(tiny, randomize)
    images, *others = inputs()
    arguments = (images.double(), *others)
    for model in (plain, skipping):
        model.set_submodule(name, Twice())
        model.set_grad_checkpointing(checkpointing)
    monkeypatch.setattr(_triton, "_warned", set())
    with pytest.warns(UserWarning, match="the last block computes all rows"):
        loss, _ = skipping.loss(*arguments)
    torch.testing.assert_close(loss, plain.loss(*arguments)[0])


def test_a_patch_that_is_not_there_is_refused(tiny):
    model = BeitForMaskedImageModeling(tiny(skip_unread_rows=True))
    images, mask, index, tokens = inputs()
    index[1] = B * L
    with pytest.raises(ValueError, match=r"index\[1\] is 86, and x has 85 rows"):
        model.loss(images, mask, index, tokens.flatten()[: len(index)])


@pytest.mark.parametrize("fields", [MODES["drop-path"], MODES["compact"]],
                         ids=["drop-path", "compact"])  # fmt: skip
def test_losses_need_no_value_on_the_host(tiny, fields):
    # The meta device has shapes and no values: nonzero, boolean indexing and .item() raise there.
    arguments = [t.to("meta") for t in inputs()]
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(tiny(skip_unread_rows=True, **fields))
        loss, _ = model.loss(*arguments)
    loss.backward()
    assert loss.shape == ()


def test_an_empty_batch_costs_nothing(tiny):
    model = BeitForMaskedImageModeling(tiny(skip_unread_rows=True, drop_path_rate=0.5))
    mask, index = torch.zeros(0, L, dtype=torch.bool), torch.zeros(0, dtype=torch.int32)
    loss, correct = model.loss(torch.zeros(0, 3, 32, 32), mask, index, mask.long())
    loss.backward()
    assert (loss.item(), correct.item()) == (0, 0)


def test_evaluation_skips_as_well(tiny, randomize):
    plain, skipping = pair(tiny, randomize, drop_path_rate=0.5)
    images, *others = inputs()
    with torch.no_grad():
        results = [m.eval().loss(images.double(), *others)[0] for m in (plain, skipping)]
    torch.testing.assert_close(*results)


def test_the_kernels_give_the_same_gradients(
    tiny, randomize, gradients, assert_agree, monkeypatch, device
):
    _, model = pair(tiny, randomize, torch.float32, drop_path_rate=0.5)
    model, arguments = model.to(device), [x.to(device) for x in inputs()]
    expected = loss_and_gradients(model, arguments, gradients)
    for function in (scale_residual, scale_residual_norm, layer_norm, fused.gather_rows):
        called = functools.partial(function, backend="triton")
        monkeypatch.setattr(fused, function.__name__, called)
    results = loss_and_gradients(model, arguments, gradients)
    assert results.pop("correct") == expected.pop("correct")
    assert_agree(results, expected)
