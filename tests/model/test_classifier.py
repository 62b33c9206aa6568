"""The classifier against timm and transformers, and what its head takes."""

import pytest
import torch
import torch.nn.functional as F

from beit_fast.model.heads import BeitForImageClassification
from tiny_models import PER_BLOCK, VANILLA

B = 3
CLASSIFIERS = {
    "per-block": PER_BLOCK,
    "shared": {},
    "vanilla": VANILLA,
    "token": {"global_pool": "token"},
}
classifier = pytest.mark.parametrize("fields", CLASSIFIERS.values(), ids=CLASSIFIERS)


@classifier
@pytest.mark.parametrize("img_size", [32, (32, 64)], ids=["4x4", "4x8"])
def test_logits_and_all_gradients_are_those_of_timm(
    tiny, randomize, timm_beit, gradients, assert_agree, fields, img_size
):
    config = tiny(img_size=img_size, **fields)
    theirs = randomize(timm_beit(config))
    ours = BeitForImageClassification(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images, target = torch.randn(B, 3, *config.image_pixels), torch.tensor([0, 4, 2])
    logits = []
    for model in (ours, theirs):
        logits.append(model(images))
        F.cross_entropy(logits[-1], target).backward()
    assert_agree(*logits)
    assert_agree(gradients(ours), gradients(theirs))
    assert_agree(ours.forward_features(images), theirs.forward_features(images))
    x = theirs.forward_features(images)
    assert_agree(ours.forward_head(x, pre_logits=True), theirs.forward_head(x, pre_logits=True))


@classifier
def test_logits_and_all_gradients_are_those_of_transformers(
    tiny, randomize, transformers_config, to_transformers, gradients, assert_agree, fields
):
    from transformers import BeitForImageClassification as TheirBeit

    config = tiny(**fields)
    ours = randomize(BeitForImageClassification(config))
    theirs = TheirBeit(transformers_config(config)).eval()

    def renamed(tensors):
        return {
            f"beit.{name}" if name.startswith("layernorm.") else name: tensor
            for name, tensor in to_transformers(tensors).items()
        }

    missing, unexpected = theirs.load_state_dict(renamed(ours.state_dict()), strict=False)
    assert (missing, unexpected) == (["beit.embeddings.mask_token"], [])
    images, target = torch.randn(B, 3, 32, 32), torch.tensor([0, 4, 2])
    logits, their_logits = ours(images), theirs(images).logits
    for out in (logits, their_logits):
        F.cross_entropy(out, target).backward()
    assert_agree(logits, their_logits)
    assert_agree(renamed(gradients(ours)), gradients(theirs))


@classifier
def test_state_dicts_load_into_timm_and_back_strictly(tiny, randomize, timm_beit, fields):
    ours, theirs = BeitForImageClassification(tiny(**fields)), timm_beit(tiny(**fields))
    state = randomize(ours).state_dict()
    theirs.load_state_dict(state, strict=True)
    back = BeitForImageClassification(tiny(**fields))
    back.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_without_classes_the_pooled_features_come_out(tiny, randomize):
    model = randomize(BeitForImageClassification(tiny(num_classes=0)))
    images = torch.randn(B, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model(images), features)
    assert features.shape == (B, 32)


def test_the_head_takes_tokens_alone(tiny):
    model = BeitForImageClassification(tiny())
    for shape in ((2, 32), (2, 17, 31), (32,)):
        with pytest.raises(ValueError, match=r"pass tokens \(B, N, 32\)"):
            model.forward_head(torch.zeros(shape))
    assert model.forward_head(torch.zeros(2, 17, 32)).shape == (2, 5)
    for wrong in (torch.int64, torch.bool):
        with pytest.raises(ValueError, match=rf"x is {wrong} \(2, 17, 32\): pass tokens"):
            model.forward_head(torch.zeros(2, 17, 32, dtype=wrong))
    features = BeitForImageClassification(tiny(num_classes=0))
    for head in (model, features):
        with pytest.raises(ValueError, match=r"x is torch\.float64, weight is torch\.float32"):
            head.forward_head(torch.zeros(2, 17, 32).double())
    half = torch.zeros(2, 17, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"run under torch\.autocast"):
        model.forward_head(half)
    with torch.autocast(half.device.type, torch.bfloat16):
        assert model.forward_head(half).shape == (2, 5)
