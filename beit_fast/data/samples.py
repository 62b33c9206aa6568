"""From the files of an image and its seed to the arrays of a sample, and from samples to a batch.

The loader knows order, threads and bad files; a sample knows what a task learns from. Letters as in
the house table: B images, L = Gh x Gw patches.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from beit_fast.data.config import MaskingConfig
from beit_fast.data.masking import draw_mask, max_masked
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.token_cache import TokenCache, check_images, check_view
from beit_fast.data.views.config import SingleViewConfig, ViewConfig
from beit_fast.data.views.single_view import single_view
from beit_fast.data.views.two_views import VIEWS, make_views

Files = TypeVar("Files", contravariant=True)  # of one image, as a source reads them


class Sample(Protocol[Files]):
    """What a loader makes of each image. Called from several threads at once."""

    def __call__(self, data: Files, seed: SampleSeed) -> dict[str, np.ndarray]:
        """What `collate` makes a batch of; all that is random comes from `seed`.

        data: what the source reads, the bytes of a file or a `MaskedImage`.

        Raises BadImageError for a file that cannot be used.
        """
        ...

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a batch. The loader adds sample_index, the image that was read, int64 (),
        to each sample; it becomes (B,)."""
        ...


class PretrainSample:
    """Two views and a mask, for masked image modelling.

    grid: patches (Gh, Gw) of the encoder; both views must split evenly into it. A batch holds
        images        uint8 (B, height, width, 3)
        token_images  uint8 (B, height, width, 3) of `view.token_size`
        mask          bool (B, L)
        masked_index  int32 (B * max_masked,): the hidden patches as b * L + l, then -1
        jitter        float32 (B, steps, 3), unless the views are jittered already or not at all:
                      what `color_jitter.jitter_views` has yet to do to both, on the device

    Raises ValueError if a view or the masking does not fit the grid.
    """

    names: Sequence[str] = VIEWS  # of the views that it makes

    def __init__(self, view: ViewConfig, masking: MaskingConfig, grid: tuple[int, int]):
        view.check_grid(grid)
        self.view, self.masking, self.grid = view, masking, grid
        self.max_masked = max_masked(grid, masking)

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        views, _ = make_views(data, self.view, seed.rng("view"), self.names)
        return views | {"seed": seed}

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        # Masks one after another: each after an image is decoded, which leaves the core's caches
        # without Python, takes half as long again.
        rngs = (sample["seed"].rng("mask") for sample in samples)
        mask = np.stack([draw_mask(self.grid, self.masking, rng).reshape(-1) for rng in rngs])
        batch = _stack(samples, leaving_out=("seed",)) | {"mask": mask}
        return batch | {"masked_index": masked_index(batch["mask"], self.max_masked)}


class CachedSample(PretrainSample):
    """The first view, a mask, and the stored tokens of the second view, which is not made.

    A batch holds what `PretrainSample`'s does, but for token_images
        tokens        int32 (B, L)

    name: what to call an image in a message. Raises TokenCacheError where an image is not the one
    that its tokens were made from.
    """

    names = ("images",)

    def __init__(
        self,
        view: ViewConfig,
        masking: MaskingConfig,
        grid: tuple[int, int],
        cache: TokenCache,
        name: Callable[[int], str],
    ):
        super().__init__(view, masking, grid)
        self.cache, self.name = cache, name

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        record = self.cache.record(seed)
        rng = random.Random(int(record["seed"]))
        views, draw = make_views(data, self.view, rng, self.names)
        return views | {
            "seed": seed,
            "tokens": record["ids"].astype(np.int32),
            "record": record,
            "crop": (draw, len(data)),
        }

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        # Here, where every image has been decoded: the one of a record may take a bad one's place.
        records = [sample["record"] for sample in samples]
        for record, sample in zip(records, samples, strict=True):
            check_view(record, *sample["crop"], self.name(int(record["image"])))
        kept = [name for name in samples[0] if name not in ("record", "crop")]
        batch = super().collate([{name: sample[name] for name in kept} for sample in samples])
        check_images(np.array([r["image"] for r in records]), batch["sample_index"], self.name)
        return batch


class TokenViewSample:
    """The second view, and what a record of a token cache holds besides its tokens.

    A batch holds
        token_images  uint8 (B, height, width, 3) of `view.token_size`
        jitter        as of `PretrainSample`
        box, flip, seed, num_bytes  (B, ...) as the record has them
    """

    names = ("token_images",)

    def __init__(self, view: ViewConfig):
        self.view = view

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        views, draw = make_views(data, self.view, seed.rng("view"), self.names)
        return views | {
            "box": np.array(draw.box, np.int32),
            "flip": np.bool_(draw.flip),
            "seed": np.uint64(seed.value("view")),
            "num_bytes": np.int64(len(data)),
        }

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return _stack(samples)


class TokenizerSample:
    """One view, for training a tokenizer: images uint8 (B, size, size, 3)."""

    def __init__(self, view: SingleViewConfig):
        self.view = view

    def __call__(self, data: bytes, seed: SampleSeed) -> dict[str, np.ndarray]:
        return {"images": single_view(data, self.view, seed.rng("view"))}

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return _stack(samples)


def masked_index(mask: np.ndarray, max_masked: int) -> np.ndarray:
    """The hidden patches of a batch in a buffer of fixed size, so that no step waits for a count.

    mask bool (B, L) -> int32 (B * max_masked,): b * L + l in ascending order, then -1.
    """
    index = np.full(len(mask) * max_masked, -1, np.int32)
    hidden = np.flatnonzero(mask)
    index[: len(hidden)] = hidden
    return index


def _stack(
    samples: list[dict[str, np.ndarray]], leaving_out: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    names = [name for name in samples[0] if name not in leaving_out]
    return {name: np.stack([sample[name] for sample in samples]) for name in names}
