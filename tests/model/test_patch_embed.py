import re

import pytest
import torch
import torch.nn.functional as F

from beit_fast import Beit, from_pretrained, save_pretrained
from beit_fast.model.patch_embed import PatchEmbed, patchify


def test_patches_are_row_major_and_ordered_as_a_convolution_weight():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, (4, 2))
    assert torch.equal(patches, F.unfold(images, (4, 2), stride=(4, 2)).transpose(1, 2))
    assert torch.equal(patches[0, 7].view(3, 4, 2), images[0, :, 4:8, 2:4])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_patch_embedding_is_the_convolution_it_stores(tiny, channels_last):
    embed = PatchEmbed(tiny(img_size=(24, 32), patch_size=(8, 16)))
    images = torch.randn(2, 3, 24, 32)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected)


def test_patches_are_embedded_as_the_images_they_are_cut_from(tiny):
    embed = PatchEmbed(tiny(img_size=(24, 32), patch_size=(8, 16)))
    images = torch.randn(2, 3, 24, 32)
    patches = patchify(images, (8, 16))
    assert torch.equal(embed(patches), embed(images))
    with pytest.raises(ValueError, match=r"patches are \(B, 6, 384\)"):
        embed(patches[:, 1:])


def test_images_of_another_size_are_refused_with_the_remedies(tiny, tmp_path):
    model, larger = Beit(tiny()).eval(), torch.zeros(1, 3, 48, 32)
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\): resize the images, or load"):
        model(larger)
    save_pretrained(model, tmp_path)
    for fields in ({"img_size": (48, 32)}, {"dynamic_img_size": True}):
        assert from_pretrained(tmp_path, Beit, **fields)(larger).shape[0] == 1


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize(
    ("shape", "remedy", "mended"),
    [
        ((3, 32, 32), "images[None]", lambda images: images[None]),
        ((2, 1, 32, 32), "images.expand(-1, 3, -1, -1)", lambda x: x.expand(-1, 3, -1, -1)),
        ((2, 32, 32, 3), "images.permute(0, 3, 1, 2)", lambda x: x.permute(0, 3, 1, 2)),
    ],
)
def test_images_of_another_layout_are_told_the_way(tiny, any_size, shape, remedy, mended):
    embed = PatchEmbed(tiny(dynamic_img_size=any_size))
    images = torch.randn(shape)
    with pytest.raises(ValueError, match=re.escape(f"pass {remedy}, ")):
        embed(images)
    assert embed(mended(images)).shape[1:] == embed(torch.randn(1, 3, 32, 32)).shape[1:]


def test_images_of_more_channels_are_for_another_model(tiny):
    images = torch.randn(1, 4, 32, 32)
    with pytest.raises(ValueError, match=r"\(1, 4, 32, 32\).* build the model with in_chans"):
        PatchEmbed(tiny())(images)
    PatchEmbed(tiny(in_chans=4))(images)
    with pytest.raises(ValueError, match="resize the images"):  # grey ones are right for this one
        PatchEmbed(tiny(in_chans=1))(torch.randn(1, 1, 40, 32))
