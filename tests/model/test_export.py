"""Programs that leave this package behind: torch's operators alone, any number of images."""

import io

import pytest
import torch

from beit_fast.acceleration.patching import accelerate, restore
from beit_fast.kernels.attention.backends import use_backend
from beit_fast.model.beit import Beit
from beit_fast.model.config import SegmenterConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.model.pyramid import BeitFeaturePyramid
from beit_fast.model.segmenter import BeitForSemanticSegmentation

OWN = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
PYRAMID = {"patch_size": 16, "img_size": 64, **OWN}
MODELS = {
    "classifier": (BeitForImageClassification, OWN),
    "shared-and-own-table": (BeitForImageClassification, {"use_rel_pos_bias": True}),
    "vanilla": (
        BeitForImageClassification,
        {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": None,
         "global_pool": "token"},
    ),
    "pyramid": (BeitFeaturePyramid, PYRAMID),
    "segmenter": (BeitForSemanticSegmentation, {}),
    "linear-segmenter": (BeitForSemanticSegmentation, {"head": "linear"}),
}  # fmt: skip
BATCH = {0: torch.export.Dim("batch")}


def configured(tiny, kind):
    """The class and the tiny config of one of MODELS."""
    model_class, fields = MODELS[kind]
    if model_class is not BeitForSemanticSegmentation:
        return model_class, tiny(**fields)
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5, **fields}
    return model_class, SegmenterConfig(img_size=(64, 96), patch_size=16, **sizes)


def exported(model, *inputs):
    return torch.export.export(model, inputs, dynamic_shapes=(BATCH,) * len(inputs))


def namespaces(program):
    """Of the operators in a program."""
    return {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def leaves(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("kind", MODELS)
def test_a_program_gives_what_the_model_gives_for_any_number_of_images(
    tiny, randomize, assert_agree, kind
):
    model_class, config = configured(tiny, kind)
    model = randomize(model_class(config)).eval()
    pixels = model.config.image_pixels
    program = exported(model, torch.randn(2, 3, *pixels))
    assert namespaces(program) == {"aten"}
    for num_images in (1, 5):
        images = torch.randn(num_images, 3, *pixels)
        found, expected = leaves(program.module()(images)), leaves(model(images))
        for one, other in zip(found, expected, strict=True):
            assert_agree(one.detach(), other.detach())


def test_a_program_takes_masks(tiny, randomize, assert_agree):
    model = randomize(BeitForMaskedImageModeling(tiny())).eval()
    program = exported(model, torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.4)
    assert namespaces(program) == {"aten"}
    images, mask = torch.randn(5, 3, 32, 32), torch.rand(5, 16) < 0.4
    assert_agree(program.module()(images, mask).detach(), model(images, mask).detach())


def test_a_program_of_another_image_size_holds_the_resized_tables(tiny, randomize, assert_agree):
    model = randomize(Beit(tiny(dynamic_img_size=True, use_rel_pos_bias=True))).eval()
    program = exported(model, torch.randn(2, 3, 48, 24))
    assert namespaces(program) == {"aten"}
    images = torch.randn(3, 3, 48, 24)
    assert_agree(program.module()(images).detach(), model(images).detach())
    assert_agree(model(images).detach(), program.module()(images).detach())  # nothing was kept


def test_a_program_has_the_dtype_of_its_model(tiny, randomize):
    exact = randomize(BeitForImageClassification(tiny(**OWN))).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    model = BeitForImageClassification(tiny(**OWN)).bfloat16().eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the rounded weights
    images = images.bfloat16()
    out = exported(model, images[:2]).module()(images)
    assert out.dtype == torch.bfloat16
    wanted = exact(images.double())
    error, eager = ((t.double() - wanted).abs().max() for t in (out, model(images)))
    assert error <= 2 * eager


def test_a_backend_that_is_asked_for_stays_in_the_program(tiny):
    model = Beit(tiny(**OWN)).eval()
    with use_backend("cpu"):
        program = exported(model, torch.randn(2, 3, 32, 32))
    assert namespaces(program) == {"aten", "beit_fast"}


# torch's own warning.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_onnx_computes_what_a_segmenter_computes(tiny, randomize, assert_agree):
    pytest.importorskip("onnxscript", reason="ONNX needs onnxscript: pip install onnxscript")
    from onnx.reference import ReferenceEvaluator

    model_class, config = configured(tiny, "segmenter")  # the pages' is a classifier
    model = randomize(model_class(config)).eval()
    pixels = model.config.image_pixels
    program = torch.onnx.export(
        model, (torch.randn(2, 3, *pixels),), dynamo=True, dynamic_shapes=(BATCH,), verbose=False
    )
    images = torch.randn(5, 3, *pixels)
    (feed,) = program.model_proto.graph.input
    found = ReferenceEvaluator(program.model_proto).run(None, {feed.name: images.numpy()})
    for one, other in zip(found, leaves(model(images)), strict=True):
        assert_agree(torch.from_numpy(one), other.detach())


@pytest.mark.filterwarnings("ignore")  # torch's, of what is old and of what a trace cannot see
@pytest.mark.parametrize("kind", ["ours", "pyramid", "accelerated", "inside"])
@pytest.mark.parametrize("exporter", ["trace", "script", "onnx"])
def test_an_old_exporter_is_refused_with_the_names_of_the_new(exporter, kind, tiny, timm_beit):
    if kind == "pyramid":
        model = BeitFeaturePyramid(tiny(**PYRAMID)).eval()
    elif kind == "accelerated":
        model = timm_beit(tiny(**OWN)).eval()
        accelerate(model)
    else:
        model = BeitForImageClassification(tiny(**OWN)).eval()
    model = torch.nn.Sequential(model) if kind == "inside" else model
    images = torch.randn(2, 3, *((64, 64) if kind == "pyramid" else (32, 32)))
    run = {
        "trace": lambda: torch.jit.trace(model, images),
        "script": lambda: torch.jit.script(model),
        "onnx": lambda: torch.onnx.export(model, (images,), io.BytesIO(), dynamo=False),
    }[exporter]
    with pytest.raises(
        ValueError, match=r"use torch.export.export, or torch.onnx.export.*dynamo=True"
    ):
        run()
    assert not torch.jit.is_tracing()
    found = leaves(exported(model, images).module()(images))  # the remedy
    for one, other in zip(found, leaves(model(images)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")  # torch's, as above
def test_what_was_accelerated_is_traced_after_restore(tiny, timm_beit):
    model = timm_beit(tiny(**OWN)).eval()
    accelerate(model)
    restore(model)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))
