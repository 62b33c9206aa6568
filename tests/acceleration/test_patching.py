"""Accelerated models against the same models as their libraries run them."""

import copy
import io
import pickle
import sys

import pytest
import timm
import torch
import transformers
from torch import nn

from beit_fast import BeitForImageClassification as OurClassifier
from beit_fast import accelerate, restore
from beit_fast.acceleration.patching import Accelerated
from beit_fast.kernels import _triton
from beit_fast.kernels.attention.backends import use_backend
from tiny_models import PER_BLOCK, VANILLA, build_timm

FAMILIES = {
    "shared": {},
    "per-block": PER_BLOCK,
    "shared-and-per-block": {"use_rel_pos_bias": True},
    "vanilla": VANILLA,
    "token-pooling": {"use_rel_pos_bias": True, "global_pool": "token"},
    "no-bias": {"use_shared_rel_pos_bias": False},
}
MODELS = {
    "timm": lambda config, c: build_timm(config),
    "transformers": lambda config, c: transformers.BeitForImageClassification(c),
    "transformers-mim": lambda config, c: transformers.BeitForMaskedImageModeling(c),
}
TABLE = "relative_position_bias_table"
every_model = pytest.mark.parametrize("kind", MODELS)
either = pytest.mark.parametrize("kind", ["timm", "transformers"])


@pytest.fixture
def pair(tiny, randomize, transformers_config):
    """A model and its accelerated copy, random weights, in eval."""

    def make(kind, attention="sdpa", hidden_dropout=0.0, **fields):
        config = tiny(**(PER_BLOCK | fields))
        theirs = transformers_config(config)
        theirs._attn_implementation = attention
        theirs.drop_path_rate = config.drop_path_rate
        theirs.hidden_dropout_prob = hidden_dropout
        model = randomize(MODELS[kind](config, theirs)).eval()
        accelerated = copy.deepcopy(model)
        accelerate(accelerated)
        return model, accelerated

    return make


def run(model, images, **options):
    out = model(images, **options)
    return out if isinstance(out, torch.Tensor) else out.logits


def results(model, images, dout=None, seed=3, **options):
    """The output and the gradient of everything that is trained, by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = run(model, images, **options)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    named = model.named_parameters()
    return {"out": out.detach(), **{n: p.grad for n, p in named if p.grad is not None}}


def assert_within(ours, theirs, exact):
    """Error against fp64 at most twice the library's own, plus one rounding, tensor by tensor."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, want in exact.items():
        allowed = 2 * (theirs[name].double() - want).norm()
        allowed = allowed + torch.finfo(theirs[name].dtype).eps * want.norm()
        error = (ours[name].double() - want).norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@every_model
def test_outputs_and_all_gradients_are_the_librarys(pair, assert_agree, kind, family):
    model, accelerated = pair(kind, **family)
    images = torch.randn(3, 3, 32, 32)
    options = {}
    if kind == "transformers-mim":
        options["bool_masked_pos"] = torch.rand(3, 16) < 0.4
    for training in (False, True):
        theirs, ours = (results(m.train(training), images, **options) for m in (model, accelerated))
        assert_agree(ours, theirs)
        with torch.no_grad():
            outputs = [run(m, images, **options) for m in (accelerated, model)]
        assert_agree(*outputs)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@either
def test_bf16_is_as_exact_as_the_library(pair, kind, family):
    model, accelerated = pair(kind, **family)
    images = torch.randn(3, 3, 32, 32).bfloat16()
    model.bfloat16()
    exact = results(copy.deepcopy(model).double(), images.double())
    assert_within(results(accelerated.bfloat16(), images), results(model, images), exact)


@either
def test_autocast_is_as_exact_as_the_library(pair, kind):
    model, accelerated = pair(kind)
    images = torch.randn(3, 3, 32, 32)
    exact = results(copy.deepcopy(model).double(), images.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = results(model, images), results(accelerated, images)
    assert [t.dtype for t in ours.values()] == [t.dtype for t in theirs.values()]
    assert_within(ours, theirs, exact)


@either
def test_the_triton_kernels_take_an_accelerated_model(pair, kind, device):
    model, accelerated = (m.to(device) for m in pair(kind, num_heads=2, img_size=16, depth=1))
    images = torch.randn(2, 3, 16, 16, device=device)
    exact = results(copy.deepcopy(model).double(), images.double())
    with use_backend("triton"):
        ours = results(accelerated, images)
    for name, want in exact.items():
        assert (ours[name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@either
def test_a_gpu_is_as_exact_as_the_library_there(pair, kind, dtype):
    model, accelerated = (
        m.to("cuda", dtype) for m in pair(kind, embed_dim=128, num_heads=2, drop_path_rate=0.1)
    )
    images = torch.randn(3, 3, 32, 32, device="cuda", dtype=dtype)
    exact = results(copy.deepcopy(model).double(), images.double())
    assert_within(results(accelerated, images), results(model, images), exact)
    model.train(), accelerated.train()
    results(accelerated, images)  # draws on the device
    with torch.no_grad():
        assert run(accelerated.eval(), images).isfinite().all()


@either
def test_frozen_and_partly_frozen_models_get_the_same_gradients(pair, assert_agree, kind):
    for trained in (("head", "classifier"), ("head", "classifier", "1."), (TABLE,)):
        model, accelerated = pair(kind)
        for m in (model, accelerated):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(any(part in name for part in trained))
        images = torch.randn(2, 3, 32, 32)
        theirs, ours = (results(m.train(), images) for m in (model, accelerated))
        assert 1 < len(ours) < 40
        assert_agree(ours, theirs)


@either
def test_training_draws_what_the_library_draws(pair, assert_agree, kind):
    model, accelerated = pair(kind, drop_path_rate=0.5, hidden_dropout=0.1)
    if kind == "timm":
        for m in (model, accelerated):
            for block in m.blocks:
                block.attn.proj_drop.p = 0.1
    images = torch.randn(8, 3, 32, 32)
    theirs, ours = (results(m.train(), images) for m in (model, accelerated))
    assert_agree(ours, theirs)
    assert not torch.allclose(ours["out"], results(accelerated, images, seed=4)["out"])
    assert_agree(results(accelerated.eval(), images), results(model.eval(), images))


@either
def test_attention_dropout_drops_at_its_rate_and_not_in_eval(pair, assert_agree, kind):
    model, accelerated = pair(kind, init_values=None)
    for module in accelerated.modules():
        if isinstance(module, timm.models.beit.Attention):
            module.attn_drop.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [run(accelerated.train(), images) for _ in range(2)]
        assert not torch.allclose(*outputs)
        assert_agree(run(accelerated.eval(), images), run(model, images))


@either
def test_the_bias_is_never_stale(pair, assert_agree, monkeypatch, kind):
    model, accelerated = pair(kind, use_shared_rel_pos_bias=True)
    other, _ = pair(kind, use_shared_rel_pos_bias=True)
    built = []
    original = torch.ops.beit_fast.rel_pos_bias
    monkeypatch.setattr(
        torch.ops.beit_fast, "rel_pos_bias", lambda *a: built.append(a) or original(*a)
    )
    images = torch.randn(2, 3, 32, 32)

    def check():
        with torch.no_grad():
            assert_agree(run(accelerated.eval(), images), run(model.eval(), images))

    def both(change):
        for m in (model, accelerated):
            change(m)
        check()

    def tables(m):
        return [p for name, p in m.named_parameters() if name.endswith(TABLE)]

    check()
    assert len(built) == 3  # the shared one, and one per block
    check()
    assert len(built) == 3
    both(lambda m: m.load_state_dict(other.state_dict()))
    assert len(built) == 6

    def step(m):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        results(m.train(), images)
        optimizer.step()

    both(step)
    new = [torch.randn_like(t) for t in tables(model)]

    def assign(m):
        for table, values in zip(tables(m), new, strict=True):
            table.data = values.clone()

    both(assign)
    both(lambda m: [t.data.mul_(2) for t in tables(m)])  # no version counter sees this
    both(lambda m: m.double().float())
    with torch.no_grad():
        bf16 = [run(m.bfloat16(), images.bfloat16()) for m in (accelerated, model)]
    torch.testing.assert_close(*bf16, rtol=0.05, atol=0.05)
    assert len({a[0].dtype for a in built}) == 2


def test_a_bias_built_in_inference_mode_serves_a_training_step(pair, assert_agree):
    model, accelerated = pair("timm")
    images = torch.randn(2, 3, 32, 32)
    for m in (model, accelerated):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(not name.endswith(TABLE))
    with torch.inference_mode():
        run(accelerated, images)
    assert_agree(results(accelerated, images), results(model, images))


def test_a_bias_that_a_hook_writes_into_is_built_again(pair, assert_agree):
    model, accelerated = pair("transformers")
    for m in (model, accelerated):
        bias = m.beit.layers[0].relative_position_bias
        bias.register_forward_hook(lambda module, args, out: out.mul_(0.5))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            assert_agree(run(accelerated, images), run(model, images))


@every_model
def test_names_parameters_and_state_stay(pair, kind):
    model, accelerated = pair(kind)
    before = dict(accelerated.named_parameters())
    restore(accelerated)
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in model.modules()]
    assert {k: vars(m).keys() for k, m in accelerated.named_modules()} == {
        k: vars(m).keys() for k, m in model.named_modules()
    }
    report = accelerate(accelerated)
    after = dict(accelerated.named_parameters())
    assert all(before[name] is after[name] for name in before)
    assert before.keys() == after.keys() == dict(model.named_parameters()).keys()
    assert accelerated.state_dict().keys() == model.state_dict().keys()
    assert not report.left
    assert accelerate(accelerated).replaced == report.replaced  # again changes nothing
    pairs = zip(model.modules(), accelerated.modules(), strict=True)
    assert all(isinstance(ours, type(theirs)) for theirs, ours in pairs)
    assert [type(m).__name__ for m in accelerated.modules()] == [
        type(m).__name__ for m in model.modules()
    ]


@either
def test_copies_and_pickles_are_accelerated_and_do_not_carry_the_bias(pair, kind):
    model, accelerated = pair(kind)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = run(accelerated, images)
        buffer = io.BytesIO()
        torch.save(accelerated, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(accelerated),
            pickle.loads(pickle.dumps(accelerated)),
            torch.load(buffer, weights_only=False),
        )
        for other in copies:
            caches = [m._bias_cache for m in other.modules() if isinstance(m, Accelerated)]
            assert caches
            assert all(cache._entry is None for cache in caches)
            assert torch.equal(run(other, images), out)
            restore(other)
            assert not any(isinstance(m, Accelerated) for m in other.modules())
            assert torch.equal(run(other, images), run(model, images))


@either
def test_checkpointing_changes_no_gradient(pair, assert_agree, kind):
    model, accelerated = pair(kind, drop_path_rate=0.5, use_shared_rel_pos_bias=True)
    images = torch.randn(16, 3, 32, 32)
    expected = results(accelerated.train(), images)
    for m in (model.train(), accelerated):
        if kind == "timm":
            m.set_grad_checkpointing()
        elif hasattr(m, "activation_checkpointing_enable"):  # its new name
            m.activation_checkpointing_enable()
        else:
            m.gradient_checkpointing_enable()
    calls = []
    first = accelerated.blocks[0] if kind == "timm" else accelerated.beit.layers[0]
    first.mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    ours = results(accelerated, images)
    assert len(calls) == 2
    assert_agree(ours, expected)
    assert_agree(ours, results(model, images))


@either
def test_an_accelerated_model_compiles_in_one_graph(pair, assert_agree, kind):
    _, accelerated = pair(kind)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    assert_agree(
        {n.removeprefix("_orig_mod."): t for n, t in results(compiled.train(), images).items()},
        results(accelerated, images),
    )


def test_ddp_trains_an_accelerated_model(pair, assert_agree, tmp_path):
    import torch.distributed as dist

    model, accelerated = pair("timm")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(accelerated)
        images = torch.randn(2, 3, 32, 32)
        ours = {n.removeprefix("module."): t for n, t in results(wrapped, images).items()}
        assert_agree(ours, results(model, images))
    finally:
        dist.destroy_process_group()


def test_hooks_go_on_seeing_what_they_saw(pair, assert_agree):
    model, accelerated = pair("timm")
    images = torch.randn(2, 3, 32, 32)
    seen = ([], [])
    for m, values in zip((model, accelerated), seen, strict=True):
        block = m.blocks[1]
        for module in (block, block.attn, block.norm1, block.norm2, block.mlp, block.attn.proj):
            module.register_forward_hook(lambda mod, args, out, values=values: values.append(out))
        run(m, images)
    assert len(seen[0]) == 6
    for theirs, ours in zip(*seen, strict=True):
        assert_agree(ours, theirs)


@pytest.fixture
def forget_warnings(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())


def test_attention_weights_are_transformers_own_and_said_once(pair, assert_agree, forget_warnings):
    model, accelerated = pair("transformers", attention="eager")
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="attention weights are asked for"):
        ours = accelerated(images, output_attentions=True, output_hidden_states=True)
    ours = accelerated(images, output_attentions=True, output_hidden_states=True)  # silent now
    theirs = model(images, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == 2
    for name in ("attentions", "hidden_states"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert_agree(one, other)
    assert accelerated.beit.layers[0].attention(torch.randn(1, 17, 32))[1] is None  # that call only


def test_a_hook_on_eager_attention_gets_its_weights(pair, forget_warnings):
    _, accelerated = pair("transformers", attention="eager")
    weights = []
    attention = accelerated.beit.layers[0].attention
    attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    with pytest.warns(UserWarning, match="attention weights"):
        run(accelerated, torch.randn(2, 3, 32, 32))
    assert weights[0].shape == (2, 4, 17, 17)


def test_timm_weights_hooked_after_the_softmax_are_seen(pair, forget_warnings):
    weights = []
    _, accelerated = pair("timm")
    attn = accelerated.blocks[0].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    with pytest.warns(UserWarning, match="attn_drop"):
        run(accelerated, torch.randn(2, 3, 32, 32))
    assert weights[0].shape == (2, 4, 17, 17)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's interpolation
def test_set_input_size_keeps_working(pair, assert_agree):
    model, accelerated = pair("timm", use_shared_rel_pos_bias=True)
    with torch.no_grad():
        run(accelerated, torch.randn(2, 3, 32, 32))
    for size in ((48, 48), (32, 64)):
        for m in (model, accelerated):
            m.set_input_size(size)
        images = torch.randn(2, 3, *size)
        assert_agree(results(accelerated, images), results(model, images))
        with torch.no_grad():
            assert_agree(run(accelerated, images), run(model, images))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (32, 64), (48, 40)])
def test_transformers_interpolates_positions_as_before(pair, assert_agree, size):
    model, accelerated = pair("transformers", use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
    images = torch.randn(2, 3, *size)
    options = {"interpolate_pos_encoding": True}
    assert_agree(results(accelerated, images, **options), results(model, images, **options))
    for _ in range(2):
        with torch.no_grad():
            assert_agree(run(accelerated, images, **options), run(model, images, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["per-block", "no-bias"])
def test_a_mask_does_what_it_did(pair, assert_agree, attention, family):
    fields = FAMILIES[family]
    model, accelerated = (m.beit for m in pair("transformers", attention, **fields))
    images, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 17, dtype=torch.long)
    mask[1, 9:] = 0
    ours, theirs = (m(images, attention_mask=mask) for m in (accelerated, model))
    assert_agree(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.allclose(ours.last_hidden_state, accelerated(images).last_hidden_state)


@pytest.mark.parametrize("name", ["BeitModel", "BeitForSemanticSegmentation", "BeitBackbone"])
def test_every_model_of_transformers_is_taken(
    tiny, randomize, transformers_config, assert_agree, name
):
    config = transformers_config(tiny(depth=4, use_rel_pos_bias=True))
    config.out_indices = [1, 2, 3, 4]
    model = randomize(getattr(transformers, name)(config)).eval()
    accelerated = copy.deepcopy(model)
    assert not accelerate(accelerated).left
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(accelerated(images)[:1], model(images)[:1], strict=True):
            one, other = (
                t if isinstance(t, torch.Tensor) else torch.stack(t) for t in (one, other)
            )
            assert_agree(one, other)


def test_models_nested_in_others_are_found_and_nothing_else_is_touched(tiny):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build_timm(tiny())
            self.own = OurClassifier(tiny())
            self.neck = nn.Linear(32, 32)

    model = Both()
    own = [type(m) for m in model.own.modules()]
    report = accelerate(model)
    assert all(path.startswith("backbone.") for path in report.replaced)
    assert report.replaced["backbone.blocks.1.attn"] == "attention with its bias"
    assert report.replaced["backbone.blocks.1.mlp.fc2"] == "linear"
    assert type(model.neck) is nn.Linear
    restore(model)
    assert [type(m) for m in model.own.modules()] == own


def test_no_class_is_edited_and_other_instances_stay(pair):
    attention, mask = timm.models.beit.Attention.forward, timm.models.beit.Block.forward
    model, _ = pair("timm")
    assert timm.models.beit.Attention.forward is attention
    assert timm.models.beit.Block.forward is mask
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_what_is_left_is_reported_with_its_reason(tiny, transformers_config):
    class Mine(timm.models.beit.Attention):
        pass

    model = build_timm(tiny(embed_dim=512, num_heads=2))
    model.blocks[0].attn = Mine(512, num_heads=2)
    model.blocks[1].mlp.fc1.forward = lambda x: x
    model.blocks[1].mlp.fc2.double()
    left = accelerate(model).left
    assert "Mine" in left["blocks.0.attn"]
    assert "256 channels" in left["blocks.1.attn"]
    assert "replaced on the instance" in left["blocks.1.mlp.fc1"]
    assert "float64" in left["blocks.1.mlp.fc2"]
    model = transformers.BeitModel(transformers_config(tiny()))
    model.config._attn_implementation = "flex_attention"
    report = accelerate(model)
    assert "flex_attention" in report.left["layers.0.attention"]
    assert "layers.0.attention" in str(report)
    assert "linear: " in str(report)


def test_a_model_without_a_beit_is_refused(tiny):
    with pytest.raises(ValueError, match="no timm Beit and no transformers BEiT"):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="already"):
        accelerate(OurClassifier(tiny()))


def test_an_older_transformers_is_refused_by_version(tiny, transformers_config, monkeypatch):
    model = transformers.BeitModel(transformers_config(tiny()))
    monkeypatch.delattr(transformers.models.beit.modeling_beit, "BeitMLP")
    monkeypatch.delitem(sys.modules, "beit_fast.acceleration.transformers", raising=False)
    with pytest.raises(ImportError, match=r"transformers>=5\.17"):
        accelerate(model)


def test_restoring_under_a_parametrization_is_refused_and_changes_nothing(pair):
    _, accelerated = pair("timm")
    linear = accelerated.blocks[0].mlp.fc1
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1"):
        restore(accelerated)
    assert isinstance(accelerated.blocks[1], Accelerated)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    restore(accelerated)
    assert not any(isinstance(m, Accelerated) for m in accelerated.modules())


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_base_size_agrees(name, assert_agree):
    torch.manual_seed(0)
    if name == "timm":
        model = timm.create_model("beit_base_patch16_224").eval()
    else:
        config = transformers.BeitConfig(use_relative_position_bias=True, drop_path_rate=0.0)
        model = transformers.BeitForImageClassification(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(TABLE) or "classifier" in parameter_name:
                parameter.normal_(std=0.3)
            if parameter_name.startswith("head"):
                parameter.normal_(std=0.02)
    images = torch.randn(1, 3, 224, 224)
    theirs = results(model, images)
    accelerate(model)
    ours = results(model, images)
    assert_agree(ours, theirs)


REGISTERED = [
    n for n in timm.list_models("beit*") if not n.startswith("beit3_")
]  # 3 is a plain ViT


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_variant_of_timm_agrees(randomize, assert_agree, name):
    """At its own size of images, with few narrow blocks, also with MLPs that none is built with."""
    images = torch.randn(1, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    others = {"swiglu": {"swiglu_mlp": True}, "normed": {"scale_mlp": True}}
    others |= {"no qkv bias": {"qkv_bias": False}}
    for fields in ({}, *(others.values() if name == REGISTERED[0] else ())):
        narrow = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **fields}
        model = randomize(timm.create_model(name, **narrow)).eval()
        accelerated = copy.deepcopy(model)
        assert accelerate(accelerated).replaced
        for training in (False, True):
            theirs, ours = (results(m.train(training), images) for m in (model, accelerated))
            assert_agree(ours, theirs)


def test_every_registered_variant_is_among_these():
    assert len(REGISTERED) >= 7
    assert any(name.startswith("beitv2_") for name in REGISTERED)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@either
def test_frozen_and_partly_frozen_in_bf16_are_as_exact_as_the_library(pair, kind, training):
    images = torch.randn(2, 3, 32, 32).bfloat16()
    for trained in (("head", "classifier"), ("head", "classifier", "1."), (TABLE,)):
        model, accelerated = (m.bfloat16().train(training) for m in pair(kind))
        for m in (model, accelerated):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(any(part in name for part in trained))
        exact = results(copy.deepcopy(model).double(), images.double())
        assert 1 < len(exact) < 40
        assert_within(results(accelerated, images), results(model, images), exact)
