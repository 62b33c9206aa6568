import pytest
import torch
import torch.nn.functional as F

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


def test_images_of_another_size_are_refused_with_both_remedies(tiny):
    embed = PatchEmbed(tiny())
    for shape in ((1, 3, 40, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\): resize the images, or"):
            embed(torch.zeros(shape))
