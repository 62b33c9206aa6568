"""Four maps of strides 4, 8, 16 and 32 from a plain BEiT, for segmentation and detection code.

Four blocks are tapped, their patch tokens laid out as maps, and each map brought to its stride by
its own part: two transposed convolutions with batch norm and GELU between, one, none, a pooling.
Names are those of unilm's segmentation checkpoints, so their backbones load; what reads features
must have been trained on the same taps. transformers' classes take features two blocks before the
taps they are given. Source: unilm beit `semantic_segmentation/backbone/beit.py`; taps as there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig

STRIDES = (4, 8, 16, 32)


class LevelShape(NamedTuple):
    """What detectron2 asks of a level, with the fields of its `ShapeSpec`."""

    channels: int
    height: int | None  # None: as the images are
    width: int | None
    stride: int


class BeitFeaturePyramid(Beit):
    """Images (B, C, height, width) to maps (B, D, height / s, width / s) for s = 4, 8, 16, 32.

    A tuple, the finest first, as mmseg and mmdet take it; with `names` a dict under these, as
    detectron2 and torchvision do. `taps` are blocks from 0, one for each map; by default those that
    end a third, a half, two thirds and the whole of the depth: 3, 5, 7, 11 of 12 and 7, 11, 15, 23
    of 24, unilm's. `config.dynamic_img_size` lets images of any size in; where 32 does not divide
    one, its last map leaves out the odd row or column. The finest map has a batch norm, of one
    device; `nn.SyncBatchNorm.convert_sync_batchnorm` makes it unilm's.
    Raises ValueError for patches other than 16 or 8, and for taps that are no blocks.

    >>> maps = BeitFeaturePyramid(BeitConfig(depth=4))(torch.zeros(1, 3, 224, 224))
    >>> [tuple(m.shape[2:]) for m in maps]
    [(56, 56), (28, 28), (14, 14), (7, 7)]
    """

    strides = STRIDES
    size_divisibility = STRIDES[-1]  # detectron2 pads images to multiples of it

    def __init__(
        self,
        config: BeitConfig,
        *,
        taps: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(config)
        if config.patch_pixels not in ((16, 16), (8, 8)):
            raise ValueError(
                f"patches are of {config.patch_pixels} pixels: strides of 4, 8, 16 and 32 are made "
                "from patches of 16 or 8"
            )
        self.taps = default_taps(config.depth) if taps is None else tuple(taps)
        if len(self.taps) != len(STRIDES) or not all(0 <= t < config.depth for t in self.taps):
            raise ValueError(
                f"taps are {self.taps}: pass 4 blocks, from 0 to {config.depth - 1}, one per stride"
            )
        if names is not None and len(set(names)) != len(STRIDES):
            raise ValueError(f"names are {list(names)}: pass 4 different ones, finest map first")
        self.names = None if names is None else tuple(names)
        self.out_channels = config.embed_dim
        for level, stride in enumerate(STRIDES, 1):
            part = _resample(config.embed_dim, config.patch_pixels[0], stride)
            setattr(self, f"fpn{level}", part)
        self.init_weights()

    def init_weights(self) -> None:
        """The encoder as pre-training starts; the pyramid as torch starts its layers."""
        super().init_weights()
        for level in range(1, len(STRIDES) + 1):
            for module in self.get_submodule(f"fpn{level}").modules():
                if isinstance(module, (nn.ConvTranspose2d, nn.BatchNorm2d)):
                    module.reset_parameters()

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """The four maps; patches (B, L, P) are of the config's grid."""
        outputs: list[Tensor] = []
        self._run(self.blocks[: max(self.taps) + 1], images, tap=outputs.append)
        grid = self.patch_embed.grid_of(images) or self.config.grid
        maps = []
        for level, tap in enumerate(self.taps, 1):
            map_BDGG = outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid)
            maps.append(self.get_submodule(f"fpn{level}")(map_BDGG))
        return tuple(maps) if self.names is None else dict(zip(self.names, maps, strict=True))

    def prune_intermediate_layers(self, *_: object, **__: object) -> list[int]:
        """Raises ValueError: the maps need their taps, and no block behind the last is computed."""
        raise ValueError(
            f"a pyramid needs its taps {self.taps}: build one with other taps, or prune a Beit"
        )

    def output_shape(self) -> dict[str, LevelShape]:
        """Channels and stride of each map by its name, or where it has none by its stride."""
        names = self.names or [f"stride{stride}" for stride in STRIDES]
        return {
            name: LevelShape(self.out_channels, None, None, stride)
            for name, stride in zip(names, STRIDES, strict=True)
        }


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """Blocks that end a third, a half, two thirds and the whole of the depth, from 0."""
    ends = (depth // 3, depth // 2, 2 * depth // 3, depth)
    return tuple(max(end - 1, 0) for end in ends)


def _resample(D: int, patch: int, stride: int) -> nn.Module:
    """From maps of a patch's stride to maps of another; unilm's modules, and so its names."""
    if patch == 4 * stride:
        norm = nn.BatchNorm2d(D)
        return nn.Sequential(_double(D), norm, nn.GELU(), _double(D))
    if patch == 2 * stride:
        return nn.Sequential(_double(D))
    if patch == stride:
        return nn.Identity()
    return nn.MaxPool2d(stride // patch)


def _double(D: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(D, D, kernel_size=2, stride=2)
