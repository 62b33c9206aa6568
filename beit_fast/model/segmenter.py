"""The class of every pixel (paper 3.2): the encoder, a pyramid of its blocks' maps, and a head."""

from torch import Tensor, nn

from beit_fast.labels import IGNORE
from beit_fast.model.beit import Beit
from beit_fast.model.config import SegmenterConfig
from beit_fast.model.init import init_segmentation
from beit_fast.model.pixel_loss import pixel_cross_entropy
from beit_fast.model.pyramid import add_pyramid, init_pyramid, pyramid_of, tapped_maps
from beit_fast.model.segmentation_heads import FCNHead, LinearHead, UperNetHead


class BeitForSemanticSegmentation(Beit):
    """The encoder with UPerNet or a linear head on its blocks; state dicts are mmsegmentation's.

    Names are those of unilm's checkpoints without "backbone."; `load_state_dict` takes both. Batch
    norms are of one device; `nn.SyncBatchNorm.convert_sync_batchnorm` makes them unilm's.

    >>> model = BeitForSemanticSegmentation(SegmenterConfig(img_size=64, depth=4)).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 150, 16, 16])

    Raises ValueError for a config that leaves the number of classes open.
    """

    config_class = SegmenterConfig
    config: SegmenterConfig

    def __init__(self, config: SegmenterConfig) -> None:
        if config.num_classes == 0:
            raise ValueError("num_classes is 0: a segmenter needs to know how many there are")
        super().__init__(config)
        D, last = config.embed_dim, (config.num_classes, config.drop_rate)
        self.decode_head: nn.Module
        self.auxiliary_head: FCNHead | None = None
        if config.head == "linear":
            self.decode_head = LinearHead(D, *last)
        else:
            add_pyramid(self)
            self.decode_head = UperNetHead(D, config.upernet_channels, *last)
            if config.auxiliary_channels:
                self.auxiliary_head = FCNHead(D, config.auxiliary_channels, *last)
        self.register_load_state_dict_pre_hook(_drop_backbone)
        self.init_weights()

    def init_weights(self) -> None:
        """Start anew, as fine-tuning does where the checkpoint has nothing."""
        init_segmentation(self)
        if self.config.head == "upernet":
            init_pyramid(self)
        for head in filter(None, (self.decode_head, self.auxiliary_head)):
            for module in head.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, num_classes, h, w) of the main head, at a stride of its own.

        UPerNet's are at a quarter of the patch (of 8 pixels: a half), the linear head's at the
        patch; `bilinear.resize` brings them to a size in pixels. images (B, C, height,
        width), normalised, or patches (B, L, P). Raises ValueError as `Beit` does, and in training
        for a batch of one image that UPerNet's batch norm cannot take.
        """
        return self.decode_head(self._maps(self.encode(images)))

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        auxiliary_weight: float = 0.4,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the pixels, and the share of labelled pixels that are right (scalars).

        images as for `forward`; labels integer (B, height, width), IGNORE (-1) where a pixel does
        not count. Scores are brought to the labels' size; the auxiliary head's loss is added with
        its weight. The mean is mmsegmentation's: over all pixels, also those that do not count,
        whose loss is 0. keep as of `Beit.forward_features`. Raises ValueError as `forward` does,
        and for labels of another shape or kind.
        """
        encoded = self.encode(images, keep=keep)
        return self.loss_of(encoded, labels, auxiliary_weight=auxiliary_weight)

    def encode(self, images: Tensor, *, keep: Tensor | None = None) -> list[Tensor]:
        """What pyramid and head are given: maps (B, D, Gh, Gw) of the tapped blocks."""
        return tapped_maps(self, images, self.config.tapped, keep=keep)

    def loss_of(
        self, encoded: list[Tensor], labels: Tensor, *, auxiliary_weight: float = 0.4
    ) -> tuple[Tensor, Tensor]:
        """`loss` from what `encode` gives. Apart, because torch.compile makes one graph of the
        encoder where the batch norms of several ranks break up the rest."""
        _check_labels(labels, len(encoded[0]))
        maps = self._maps(encoded)
        loss, accuracy = pixel_cross_entropy(self.decode_head(maps), labels)
        if self.auxiliary_head is not None and auxiliary_weight:
            auxiliary, _ = pixel_cross_entropy(self.auxiliary_head(maps[2]), labels)
            loss = loss + auxiliary_weight * auxiliary
        return loss, accuracy

    def no_weight_decay(self) -> set[str]:
        """None: unilm's test compares names without "backbone.", so it decays all that have axes.

        Source: unilm beit `mmcv_custom/layer_decay_optimizer_constructor.py`.
        """
        return set()

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def prune_intermediate_layers(self, *_: object, **__: object) -> list[int]:
        """Raises ValueError: the head needs its taps."""
        raise ValueError(
            f"a segmenter needs its taps {self.config.tapped}: build one with other taps, or prune "
            "a Beit"
        )

    def _maps(self, encoded: list[Tensor]) -> tuple[Tensor, ...] | list[Tensor]:
        return encoded if self.config.head == "linear" else pyramid_of(self, encoded)


def _check_labels(labels: Tensor, num_images: int) -> None:
    if labels.ndim != 3 or len(labels) != num_images or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)} for {num_images} images: pass whole "
            f"numbers ({num_images}, height, width), {IGNORE} where a pixel does not count"
        )


def _drop_backbone(
    _module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """mmsegmentation has the encoder and the pyramid under `backbone`."""
    start = f"{prefix}backbone."
    for name in [name for name in state_dict if name.startswith(start)]:
        state_dict[prefix + name.removeprefix(start)] = state_dict.pop(name)
