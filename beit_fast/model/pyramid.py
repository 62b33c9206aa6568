"""Four maps of growing strides from a plain BEiT, for segmentation and detection code.

Four blocks are tapped, their patch tokens laid out as maps, and each map brought to its stride by
its own part: two transposed convolutions with batch norm and GELU between, one, none, a pooling.
Names are those of unilm's segmentation checkpoints, so their backbones load; what reads features
must have been trained on the same taps. transformers' classes take features two blocks before the
taps they are given. Source: unilm beit `semantic_segmentation/backbone/beit.py`; taps as there.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor, nn

from beit_fast.model.beit import Beit
from beit_fast.model.config import BeitConfig, default_taps

LEVELS = ("fpn1", "fpn2", "fpn3", "fpn4")

# Pixels; (down, across) where a patch is not square. A fraction where 4 does not divide a patch.
Stride = int | float | tuple[int | float, int | float]


class LevelShape(NamedTuple):
    """What detectron2 asks of a level, with the fields of its `ShapeSpec`."""

    channels: int
    height: int | None  # None: as the images are
    width: int | None
    stride: Stride


class BeitFeaturePyramid(Beit):
    """Images (B, C, height, width) to four maps (B, D, height / s, width / s), s of `strides`.

    For patches of p pixels s is p / 4, p / 2, p and 2 p, for 8 pixels as in unilm p / 2, p, 2 p and
    4 p: 4, 8, 16 and 32 for both usual sizes. Maps are of channels-last layout. A tuple, the finest
    first, as mmseg and mmdet take it; with `names` a dict under these, as detectron2 and
    torchvision do. `taps` are blocks from 0, one for each map; None: `default_taps`.
    `config.dynamic_img_size` lets images of any size in; where the last stride does not divide one,
    its map leaves out what is over. The finest map has a batch norm, of one device;
    `nn.SyncBatchNorm.convert_sync_batchnorm` makes it unilm's.
    Raises ValueError for taps that are no blocks.

    >>> maps = BeitFeaturePyramid(BeitConfig(depth=4))(torch.zeros(1, 3, 224, 224))
    >>> [tuple(m.shape[2:]) for m in maps]
    [(56, 56), (28, 28), (14, 14), (7, 7)]
    """

    def __init__(
        self,
        config: BeitConfig,
        *,
        taps: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(config)
        self.taps = default_taps(config.depth) if taps is None else tuple(taps)
        if len(self.taps) != len(LEVELS) or not all(0 <= t < config.depth for t in self.taps):
            raise ValueError(
                f"taps are {self.taps}: pass 4 blocks, from 0 to {config.depth - 1}, one per stride"
            )
        if names is not None and len(set(names)) != len(LEVELS):
            raise ValueError(f"names are {list(names)}: pass 4 different ones, finest map first")
        self.names = None if names is None else tuple(names)
        self.out_channels = config.embed_dim
        self.strides = strides_of(config.patch_pixels)
        # detectron2 pads images to multiples of it.
        coarsest = _relative(config.patch_pixels)[-1]
        self.size_divisibility = math.lcm(*(int(coarsest * side) for side in config.patch_pixels))
        add_pyramid(self)
        self.init_weights()

    def init_weights(self) -> None:
        """The encoder as pre-training starts; the pyramid as torch starts its layers."""
        super().init_weights()
        init_pyramid(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """The four maps; patches (B, L, P) are of the config's grid."""
        maps = pyramid_maps(self, images, self.taps)
        return maps if self.names is None else dict(zip(self.names, maps, strict=True))

    def prune_intermediate_layers(self, *_: object, **__: object) -> list[int]:
        """Raises ValueError: the maps need their taps, and no block behind the last is computed."""
        raise ValueError(
            f"a pyramid needs its taps {self.taps}: build one with other taps, or prune a Beit"
        )

    def output_shape(self) -> dict[str, LevelShape]:
        """Channels and stride of each map by its name, or where it has none by its stride."""
        names = self.names or [f"stride{_text(stride)}" for stride in self.strides]
        return {
            name: LevelShape(self.out_channels, None, None, stride)
            for name, stride in zip(names, self.strides, strict=True)
        }


def strides_of(patch_pixels: tuple[int, int]) -> tuple[Stride, ...]:
    """Of the four maps, in pixels."""
    pairs = [[_plain(side * s) for side in patch_pixels] for s in _relative(patch_pixels)]
    return tuple(down if down == across else (down, across) for down, across in pairs)


def add_pyramid(model: Beit) -> None:
    """Give a model `fpn1` to `fpn4`, without values that mean anything: `init_pyramid`."""
    D = model.config.embed_dim
    for level, stride in zip(LEVELS, _relative(model.config.patch_pixels), strict=True):
        model.add_module(level, _resample(D, stride))


def init_pyramid(model: Beit) -> None:
    """Start `fpn1` to `fpn4` as torch starts its layers, statistics included."""
    for level in LEVELS:
        for module in model.get_submodule(level).modules():
            if isinstance(module, nn.ConvTranspose2d | nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()


def pyramid_maps(model: Beit, images: Tensor, taps: Sequence[int]) -> tuple[Tensor, ...]:
    """The pyramid of four blocks' outputs; blocks after the last do not run."""
    return pyramid_of(model, tapped_maps(model, images, taps))


def pyramid_of(model: Beit, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `fpn1` to `fpn4` make of four tapped maps."""
    return tuple(model.get_submodule(n)(m) for n, m in zip(LEVELS, maps, strict=True))


def tapped_maps(
    model: Beit, images: Tensor, taps: Sequence[int], *, keep: Tensor | None = None
) -> list[Tensor]:
    """Patch tokens of listed blocks as maps (B, D, Gh, Gw), views in channels-last layout; keep as
    of `Beit.forward_features`."""
    outputs: list[Tensor] = []
    model._run(model.blocks[: max(taps) + 1], images, keep=keep, tap=outputs.append)
    grid = model.patch_embed.grid_of(images) or model.config.grid
    return [outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in taps]


def _relative(patch_pixels: tuple[int, int]) -> tuple[Fraction, ...]:
    """Strides of the maps in patches; unilm has its own for patches of 8."""
    finest = Fraction(1, 2) if tuple(patch_pixels) == (8, 8) else Fraction(1, 4)
    return tuple(finest * 2**level for level in range(len(LEVELS)))


def _plain(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _text(stride: Stride) -> str:
    return "x".join(map(str, stride)) if isinstance(stride, tuple) else str(stride)


def _resample(D: int, stride: Fraction) -> nn.Module:
    """From maps of patches to maps of another stride; unilm's modules, and so its names."""
    if stride < 1:
        parts = [_double(D)]
        if stride == Fraction(1, 4):
            parts += [nn.BatchNorm2d(D), nn.GELU(), _double(D)]
        return nn.Sequential(*parts)
    return nn.Identity() if stride == 1 else nn.MaxPool2d(int(stride))


def _double(D: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(D, D, kernel_size=2, stride=2)
