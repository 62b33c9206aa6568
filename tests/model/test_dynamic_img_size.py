"""A model for images of any size is the model that was loaded for their size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from beit_fast.kernels.attention.rel_pos_bias import relative_position_rows
from beit_fast.model import resize
from beit_fast.model.beit import Beit
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.resize import resize_pos_embed, resize_rel_pos_table
from beit_fast.weights.load import load_pretrained
from beit_fast.weights.read import read_checkpoint
from tiny_models import PER_BLOCK

POSITIONS = {
    "shared": {},
    "own": PER_BLOCK,
    "both": {"use_rel_pos_bias": True},
    "absolute": {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False},
}
SIZE = (48, 24)  # of a model for 32 x 32 in patches of 8
GRID = (6, 3)


def pair_of(model_class, tiny, randomize, **fields):
    """The same weights for any size, and loaded for SIZE."""
    model = randomize(model_class(tiny(dynamic_img_size=True, **fields)))
    fixed = model_class(tiny(img_size=SIZE, **fields))
    load_pretrained(fixed, read_checkpoint(dict(model.state_dict()), num_heads=4))
    return model, fixed


def gradients_through_resizing(model, fixed):
    """Those of the weights of `model`, from those of `fixed` and autograd through the resizing."""
    found = {}
    for name, parameter in fixed.named_parameters():
        if parameter.grad is None:
            continue
        source = dict(model.named_parameters())[name].detach().requires_grad_()
        if name.endswith("relative_position_bias_table"):
            resized = resize_rel_pos_table(source, model.config.grid, GRID)
        elif name == "pos_embed":
            resized = resize_pos_embed(source, model.config.grid, GRID)
        else:
            resized = source.clone()
        resized.backward(parameter.grad)
        found[name] = source.grad
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_outputs_and_gradients_are_those_of_a_model_of_that_size(
    tiny, randomize, gradients, assert_agree, positions, checkpointing
):
    model, fixed = pair_of(
        BeitForImageClassification, tiny, randomize, depth=3, **POSITIONS[positions]
    )
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, *SIZE)
    weight = torch.randn(2, 5)
    ours, theirs = model(images), fixed(images)
    assert_agree(ours, theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert_agree(gradients(model), gradients_through_resizing(model, fixed))


@pytest.mark.parametrize("skips", [False, True], ids=["all-rows", "listed-rows"])
def test_masked_losses_are_those_of_a_model_of_that_size(
    tiny, randomize, gradients, assert_agree, skips
):
    fields = {"skip_unread_rows": skips}
    model, fixed = pair_of(BeitForMaskedImageModeling, tiny, randomize, **fields)
    mask = torch.rand(2, GRID[0] * GRID[1]) < 0.4
    index = mask.flatten().nonzero().flatten().int()
    batch = (torch.randn(2, 3, *SIZE), mask, index, torch.randint(24, mask.shape))
    (ours, right), (theirs, expected) = model.loss(*batch), fixed.loss(*batch)
    assert_agree(ours, theirs)
    assert right == expected
    ours.backward()
    theirs.backward()
    assert_agree(gradients(model), gradients_through_resizing(model, fixed))


@pytest.mark.parametrize("positions", POSITIONS)
def test_at_the_models_own_size_the_bits_are_those_of_a_fixed_model(tiny, randomize, positions):
    fixed = randomize(Beit(tiny(**POSITIONS[positions])))
    model = Beit(tiny(dynamic_img_size=True, **POSITIONS[positions]))
    model.load_state_dict(fixed.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), fixed(images))
    patches = model.patch_embed.patches(images)
    assert torch.equal(model(patches), fixed(images))


def test_a_change_of_the_table_is_seen_in_eval(tiny, randomize):
    model, fixed = pair_of(Beit, tiny, randomize, **POSITIONS["own"])
    images = torch.randn(1, 3, *SIZE)
    model.eval()
    fixed.eval()
    with torch.no_grad():
        model(images)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        load_pretrained(fixed, dict(model.state_dict()))
        torch.testing.assert_close(model(images), fixed(images), rtol=0, atol=1e-5)


def test_the_compiler_makes_one_graph_for_many_sizes(tiny, randomize, assert_agree):
    torch._dynamo.reset()
    every = {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "depth": 1}
    model = randomize(Beit(tiny(dynamic_img_size=True, **every)))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for height, width in ((32, 32), (48, 24), (40, 56), (16, 64)):
        images = torch.randn(2, 3, height, width)
        assert_agree(compiled(images).detach(), model(images).detach())
    assert counter.frame_count <= 3  # the own size, the first other one, all others


def test_under_autocast_tables_are_resized_as_precisely(tiny, randomize):
    model, fixed = pair_of(Beit, tiny, randomize, **POSITIONS["own"])
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images), fixed(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_captured_model_follows_its_table(tiny, randomize, assert_agree):
    model, fixed = (m.cuda().eval() for m in pair_of(Beit, tiny, randomize, **POSITIONS["own"]))
    images = torch.randn(2, 3, *SIZE, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(images)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = model(images)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        load_pretrained(fixed, dict(model.state_dict()))
        graph.replay()
        assert_agree(out, fixed(images))


def test_sizes_that_do_not_fit_are_refused_with_what_to_do(tiny):
    fixed, model = Beit(tiny()), Beit(tiny(dynamic_img_size=True))
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        fixed(torch.zeros(1, 3, 48, 24))
    with pytest.raises(ValueError, match="48x20 pixels do not divide into patches of 8x8: pad"):
        model(torch.zeros(1, 3, 48, 20))
    with pytest.raises(ValueError, match="0x32 pixels"):
        model(torch.zeros(1, 3, 0, 32))
    with pytest.raises(ValueError, match=r"\(1, 4, 32, 32\), the model takes \(B, 3, height"):
        model(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="those of another grid do not tell it: pass images"):
        model(torch.zeros(1, 18, 192))


def test_an_empty_batch_of_another_size_is_an_input(tiny):
    assert Beit(tiny(dynamic_img_size=True))(torch.zeros(0, 3, 48, 24)).shape == (0, 19, 32)


@pytest.mark.parametrize(("src", "dst"), [((3, 2), (4, 5)), ((4, 3), (2, 2))], ids=str)
def test_the_gradient_of_resizing_is_that_of_the_formula(src, dst):
    table = torch.randn(relative_position_rows(src), 2, dtype=torch.float64, requires_grad=True)
    function = torch.ops.beit_fast.resize_rel_pos_table
    torch.autograd.gradcheck(resize_rel_pos_table, (table, src, dst), fast_mode=True)
    torch.autograd.gradgradcheck(resize_rel_pos_table, (table, src, dst), fast_mode=True)
    torch.library.opcheck(function, (table, list(src), list(dst), False))
    torch.library.opcheck(function, (resize_rel_pos_table(table, src, dst).detach(),
                                     list(src), list(dst), True))  # fmt: skip


def test_what_is_kept_for_resizing_is_bounded():
    for kept in (resize._axis_matrix, resize._axis_matrix_on):
        kept.cache_clear()
        assert kept.cache_info().maxsize is not None
    for table in (torch.zeros(12, 2), torch.ones(12, 2)):
        for length in (3, 4, 5):
            resize_rel_pos_table(table, (2, 2), (length, length))
    assert resize._axis_matrix_on.cache_info().currsize == 3  # by lengths, not by tables or axes
