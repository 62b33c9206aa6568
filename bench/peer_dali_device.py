"""NVIDIA's DALI as a peer: two views of one random crop, jittered and flipped, decoded on a device.

The nearest that its operators come to what kind gpu makes: jitter in one fixed order, bicubic and
Lanczos with antialiasing, bytes in, uint8 out. Two runs are prepared ahead, as by its own loaders.

    pip install nvidia-dali-cuda130
"""

from collections.abc import Callable

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from beit_fast.data.views.config import ViewConfig

AHEAD = 2
THREADS = 8


def dali_views(
    read: Callable[[int], bytes], view: ViewConfig, batch: int, device: torch.device
) -> Pipeline:
    """Built; each `run()` gives a batch of both views, on the device."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=THREADS if on_gpu else 1,
        device_id=(device.index or 0) if on_gpu else None,
        seed=0,
        prefetch_queue_depth=AHEAD,
    )

    def factor() -> object:
        return fn.random.uniform(range=[1 - view.color_jitter, 1 + view.color_jitter])

    with pipeline:
        encoded = fn.external_source(
            source=lambda info: np.frombuffer(read(info.idx_in_epoch), np.uint8),
            batch=False,
            dtype=types.UINT8,
        )
        corner, extent = fn.random_crop_generator(
            fn.peek_image_shape(encoded),
            random_area=list(view.scale),
            random_aspect_ratio=list(view.ratio),
        )
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")
        images = fn.color_twist(images, brightness=factor(), contrast=factor(), saturation=factor())
        images = fn.slice(images, corner, extent, axes=[0, 1])
        images = fn.flip(images, horizontal=fn.random.coin_flip(probability=view.hflip))
        filters = (types.INTERP_CUBIC, view.size), (types.INTERP_LANCZOS3, view.token_size)
        pipeline.set_outputs(
            *(
                fn.resize(images, size=list(size), interp_type=interpolation, antialias=True)
                for interpolation, size in filters
            )
        )
    pipeline.build()
    return pipeline
