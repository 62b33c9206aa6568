"""What reads maps and scores classes at each place: UPerNet, FCN and a linear probe.

Names are mmsegmentation's, so that unilm's checkpoints load. All keep maps in channels-last layout.
Source: UPerNet arXiv:1807.10221, FCN arXiv:1411.4038; mmsegmentation `models/decode_heads`; the
linear head DINOv2 `eval/segmentation/models/decode_heads/linear_head.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.model.bilinear import Pool, resize
from beit_fast.model.enlarged_conv import conv_of_enlarged
from beit_fast.model.layers import is_plain

POOLS = (1, 2, 3, 6)  # sides of the pooled maps


class ConvModule(nn.Module):
    """A convolution that keeps the size, batch norm, ReLU; mmcv's names."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def of_enlarged(self, maps: Sequence[Tensor]) -> Tensor:
        """The same of maps joined at the first one's size, without joining them."""
        if is_plain(self, ConvModule) and is_plain(self.conv, nn.Conv2d):
            return F.relu(self.bn(conv_of_enlarged(maps, self.conv.weight)))
        size = maps[0].shape[2:]  # hooked, or another layer in its place
        return self(torch.cat([resize(each, size) for each in maps], dim=1))


class UperNetHead(nn.Module):
    """Four maps of D channels, the finest first, to scores at the finest: (B, num_classes, h, w).

    The coarsest map is pooled to 1, 2, 3 and 6 squares and joined with what these say of it; each
    finer map adds the coarser one, enlarged; all four, at the finest's size, are mixed.
    """

    def __init__(self, D: int, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            # The pooling is mmsegmentation's 0.
            nn.Sequential(Pool(side), ConvModule(D, channels, 1))
            for side in POOLS
        )
        self.bottleneck = ConvModule(D + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(D, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        self._check_batch(maps[-1])
        paths = [lateral(each) for lateral, each in zip(self.lateral_convs, maps[:-1], strict=True)]
        paths.append(self._pooled(maps[-1]))
        for level in (2, 1, 0):
            paths[level] = paths[level] + resize(paths[level + 1], paths[level].shape[2:])
        levels = [conv(path) for conv, path in zip(self.fpn_convs, paths[:-1], strict=True)]
        mixed = self.fpn_bottleneck.of_enlarged((*levels, paths[-1]))
        return self.conv_seg(self.dropout(mixed))

    def _pooled(self, x: Tensor) -> Tensor:
        parts = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        # A map of 1x1 has no layout that enlarging could keep.
        joined = torch.cat((x, *parts), dim=1).contiguous(memory_format=torch.channels_last)
        return self.bottleneck(joined)

    def _check_batch(self, x: Tensor) -> None:
        norm = self.psp_modules[0][1].bn
        # What synchronises statistics is of another type, and has more images than these.
        if norm.training and type(norm) is nn.BatchNorm2d and x.shape[0] == 1:
            raise ValueError(
                "a batch of 1 image came, and in training UPerNet's batch norm of a map pooled to "
                "1x1 needs 2 values for each channel: pass 2 images or more, several ranks with "
                "SyncBatchNorm, or call model.decode_head.eval(), which leaves statistics as they "
                "are"
            )


class FCNHead(nn.Module):
    """One map (B, D, h, w) to scores (B, num_classes, h, w); beside the main head in training."""

    def __init__(self, D: int, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(D, channels, 3))
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


class LinearHead(nn.Module):
    """One map (B, D, Gh, Gw) to scores (B, num_classes, Gh, Gw): batch norm and one product."""

    def __init__(self, D: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(D)
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(D, num_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.dropout(self.bn(maps[0])))
