"""Our loader against those of other libraries, each with one thread: images a second of CPU time.

All make batches of 64 from the same JPEGs, uint8 and not normalised (a device does that). Each is
written as its documentation has it, and takes one batch in turn:

    one view   crop of 8 to 100 % resized to 224 bicubic, flipped: what trains a classifier
    two views  jittered whole, flipped, one crop resized to 224 bicubic and to 112 Lanczos: BEiT

    torchvision           Pillow images in its DataLoader; two views as the official code has them
    torchvision, tensors  its JPEG decoder and its transforms v2 on tensors; no Lanczos there
    timm                  its training transform and `fast_collate`
    webdataset            the same as torchvision, from a tar on disk
    DALI                  its CPU pipeline, see peer_dali.py; it decodes no more than the crop where
                          nothing is jittered

Ours reads from memory in its shuffled order. Its jitter is the device's to make: on a CPU that is
time of the training thread, and a row has it. FFCV has no wheels, and its format is its own.
"""

import io
import statistics
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from data_images import InMemory, ManyTimes
from PIL import Image

from beit_fast.data.config import MaskingConfig
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample, Sample
from beit_fast.data.views.augment import AugmentedSample
from beit_fast.data.views.color_jitter import jitter_views
from beit_fast.data.views.config import AugmentConfig, ViewConfig
from beit_fast.data.views.statistics import IMAGENET_MEAN

SIZE, TOKEN_SIZE, SCALE, RATIO, JITTER = 224, 112, (0.08, 1.0), (3 / 4, 4 / 3), 0.4
BATCH_SIZE = 64
FEW = 20_000  # images of a peer's data set: enough for every round, and shuffled in no time
WHAT = {"one view": "one", "two views": "two", "two views, no jitter": "two-plain"}

Batches = Iterator[object]


def bench_loaders(
    source: InMemory, what: str, rounds: int, gpu_rates: Sequence[int], dali: str | None
) -> list[dict]:
    """Rows of the loaders that make `what`, one of WHAT, ours first.

    dali: a Python that has it, or none: then it is not among them.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's decoder is deprecated in later versions
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaders = {**_ours(source, what), **_peers(source, what, folder)}
        clocks = {name: _clock(batches) for name, batches in loaders.items()}
        if dali is not None:
            clocks["DALI"] = stack.enter_context(_Dali(dali, source, WHAT[what], folder)).seconds
        measured: dict[str, list[float]] = {name: [] for name in clocks}
        for clock in clocks.values():
            clock()
        names = list(clocks)
        for _ in range(rounds):
            for name in names:
                measured[name].append(BATCH_SIZE / clocks[name]())
            names.reverse()
        for batches in loaders.values():
            if hasattr(batches, "close"):
                batches.close()
    ours = statistics.median(next(iter(measured.values())))
    return [
        {
            "case": name,
            "median": statistics.median(rate),
            "low": min(rate),
            "high": max(rate),
            "ours by it": ours / statistics.median(rate),
            **{f"cores for {n}/s": n / statistics.median(rate) for n in gpu_rates},
        }
        for name, rate in measured.items()
    ]


def _clock(batches: Batches) -> Callable[[], float]:
    """CPU seconds of this process for one more batch."""

    def seconds() -> float:
        start = time.process_time()
        next(batches)
        return time.process_time() - start

    return seconds


def _ours(source: InMemory, what: str) -> dict[str, Batches]:
    def load(sample: Sample) -> Batches:
        many = ManyTimes(source)
        loader = Loader(many, sample, batch_size=BATCH_SIZE, num_threads=0, max_bad_share=1.0)
        return loader.batches()

    def views(kind: str) -> Sample:
        view = ViewConfig(kind=kind, color_jitter=JITTER if what == "two views" else 0.0)
        return PretrainSample(view, MaskingConfig(), (14, 14))

    if what == "one view":
        plain = AugmentConfig(rand_augment=None, erase=0.0, mixup=0.0, cutmix=0.0)
        return {"ours": load(AugmentedSample((SIZE, SIZE), plain, IMAGENET_MEAN))}
    loaders = {"ours": load(views("fast")), "ours, reference": load(views("reference"))}
    if what == "two views":
        loaders["ours, its jitter too"] = map(jitter_views, load(views("fast")))
    return loaders


def _peers(source: InMemory, what: str, folder: Path) -> dict[str, Batches]:
    pillow = _one_view() if what == "one view" else _two_views(what == "two views")
    peers = {
        "torchvision": _batches(source, lambda data: pillow(_opened(data))),
        "torchvision, tensors": _batches(source, _on_tensors(what)),
        "webdataset": _webdataset(source, pillow, folder),
    }
    if what == "one view":
        peers["timm"] = _timm(source)
    return peers


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _one_view() -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms as tv

    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO, interpolation=bicubic)
    return tv.Compose([crop, tv.RandomHorizontalFlip(), tv.PILToTensor()])


def _two_views(jittered: bool) -> Callable[[Image.Image], tuple[torch.Tensor, ...]]:
    from torchvision import transforms as tv
    from torchvision.transforms import functional

    jitter = tv.ColorJitter(JITTER, JITTER, JITTER) if jittered else tv.Lambda(lambda image: image)
    before = tv.Compose([jitter, tv.RandomHorizontalFlip()])
    how = {
        SIZE: tv.InterpolationMode.BICUBIC,
        TOKEN_SIZE: tv.InterpolationMode.LANCZOS,
    }

    def views(image: Image.Image) -> tuple[torch.Tensor, ...]:
        image = before(image)
        box = tv.RandomResizedCrop.get_params(image, SCALE, RATIO)
        crops = (functional.resized_crop(image, *box, [n, n], filter) for n, filter in how.items())
        return tuple(functional.pil_to_tensor(crop) for crop in crops)

    return views


def _on_tensors(what: str) -> Callable[[bytes], object]:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms.v2 import functional

    bicubic = InterpolationMode.BICUBIC
    jitter = [v2.ColorJitter(JITTER, JITTER, JITTER)] if what == "two views" else []
    before = v2.Compose([*jitter, v2.RandomHorizontalFlip()])
    sizes = (SIZE,) if what == "one view" else (SIZE, TOKEN_SIZE)
    boxes = v2.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO)

    def decoded(data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            return decode_image(encoded, ImageReadMode.RGB)
        except RuntimeError:  # a format that it has not
            return functional.pil_to_tensor(_opened(data))

    def views(data: bytes) -> tuple[torch.Tensor, ...]:
        image = before(decoded(data))
        box = boxes.make_params([image])
        crop = functional.crop(image, **box)
        return tuple(
            functional.resize(crop, [n, n], interpolation=bicubic, antialias=True) for n in sizes
        )

    return views


class _Files(torch.utils.data.Dataset):
    def __init__(self, source: InMemory, make: Callable[[bytes], object]) -> None:
        self._source, self._make = source, make

    def __len__(self) -> int:
        return FEW

    def __getitem__(self, index: int) -> object:
        return self._make(self._source.read(index))


def _batches(
    source: InMemory, make: Callable[[bytes], object], collate: Callable | None = None
) -> Batches:
    """torch's DataLoader, in this process."""
    return iter(
        torch.utils.data.DataLoader(
            _Files(source, make), batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate
        )
    )


def _timm(source: InMemory) -> Batches:
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        SIZE,
        is_training=True,
        use_prefetcher=True,  # uint8: it normalises on the device
        scale=SCALE,
        ratio=RATIO,
        color_jitter=None,
        interpolation="bicubic",
    )
    return _batches(source, lambda data: (transform(_opened(data)), 0), fast_collate)


def _webdataset(source: InMemory, make: Callable[[Image.Image], object], folder: Path) -> Batches:
    import webdataset

    path = folder / "images.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(max(BATCH_SIZE, len(source))):
            member = tarfile.TarInfo(f"{i:06}.jpg")
            member.size = len(source.read(i))
            tar.addfile(member, io.BytesIO(source.read(i)))
    images = webdataset.WebDataset(str(path), shardshuffle=False).repeat().shuffle(BATCH_SIZE)
    made = images.decode("pilrgb").to_tuple("jpg").map(lambda files: make(files[0]))
    return iter(torch.utils.data.DataLoader(made, batch_size=BATCH_SIZE))


class _Dali:
    """DALI in its own Python, a batch when it is asked for one."""

    def __init__(self, python: str, source: InMemory, what: str, folder: Path) -> None:
        images = folder / "files"
        images.mkdir()
        for i in range(len(source)):
            (images / f"{i:06}.jpg").write_bytes(source.read(i))
        script = Path(__file__).with_name("peer_dali.py")
        command = [python, script, images, what, str(BATCH_SIZE)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._process.stdout.readline().strip()
        if not self.version:
            self._process.communicate()
            raise RuntimeError(f"{python} has no DALI that runs, see above")

    def seconds(self) -> float:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def __enter__(self) -> "_Dali":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends with its input
