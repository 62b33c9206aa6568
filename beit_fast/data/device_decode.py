"""Plain JPEGs to pixels, a batch at once, on the device that trains: by nvJPEG, through torchcodec.

A decoder that meets one bad image may give up the batch. Then its halves are decoded, and theirs,
until the image is alone: that one goes to the CPU, which decodes it or says what is wrong with it,
as it would for any other kind of views. Where the device is a CPU all images are decoded one by
one.

nvJPEG's hardware engine works outside CUDA's streams; torchcodec waits for the caller's stream
before and after it since 0.17 (pull request 1634). Earlier ones, and torchvision's decoder of this
name (issue 9606), overwrite memory that is in use, so there is no other choice.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import beit_fast.data
from beit_fast.data.sources.decode import BadImageError, decode_fast, import_decode_jpeg
from beit_fast.data.sources.jpeg import Jpeg, plain_jpeg
from beit_fast.errors import RunError, is_out_of_memory
from beit_fast.flags import flag

# uint8 (bytes,) of each image, on the CPU -> uint8 (3, height, width) of each, on the device.
DecodeBatch = Callable[[list[Tensor]], list[Tensor]]
REFUSED = "refused by the device's decoder"
_SAFE_TORCHCODEC = (0, 17)
_PROBE = "cat.jpg"  # a photograph of this package that every decoder can decode


class DeviceDecodeError(RunError):
    """The device's decoder is not there, decodes nothing, or found no memory."""


class DecodeCounts:
    """How many images were decoded, and of those that the CPU decoded why. For all threads."""

    def __init__(self) -> None:
        self._lock, self._total, self._odd = threading.Lock(), 0, Counter()

    def add(self, reasons: Iterable[str]) -> None:
        """Of each image of a batch why the CPU decoded it; "": it was left to the device."""
        with self._lock:
            for reason in reasons:
                self._total += 1
                self._odd[reason] += bool(reason)

    def odd(self) -> dict[str, int]:
        """Images by the reason that the CPU decoded them, the most frequent first."""
        with self._lock:
            return {reason: count for reason, count in self._odd.most_common() if count}

    def __str__(self) -> str:
        """For the end of a run; "" where nothing was odd."""
        odd = self.odd()
        if not odd:
            return ""
        why = ", ".join(f"{count} {reason}" for reason, count in odd.items())
        return (
            f"{sum(odd.values())} of {self._total} images loaded here were left to the CPU's "
            f"decoder: {why}"
        )


class DeviceDecoder:
    """The pixels of plain images, for one thread. decode_batch: what decodes on the device; None:
    it has no decoder, the CPU does it all."""

    def __init__(self, device: torch.device, decode_batch: DecodeBatch | None) -> None:
        self._device, self._decode_batch = device, decode_batch
        self._works = False  # on some image
        self._kind = flag("views.kind")  # here, for threads do not know it

    def __call__(self, images: Sequence[Jpeg]) -> list[tuple[Tensor | BadImageError, str]]:
        """Of each image its pixels, uint8 (3, height, width), or what is wrong with it; and why it
        was left to the CPU's decoder, "" where it was not. That one's pixels are not on the device.

        Raises DeviceDecodeError where the device decodes nothing: none of these, none before, and
        no photograph of ours. A batch may hold one plain image, and that one may be odd.
        """
        if self._decode_batch is None:
            return [(_decode_on_cpu(image), "") for image in images]
        self._refusal = Exception("of nothing")
        decoded = self._decode_in_parts(images)
        if not self._works and any(isinstance(pixels, Tensor) for pixels, _ in decoded):
            refusal = self._refusal
            self._decode_in_parts([_photograph()])
            if not self._works:
                raise DeviceDecodeError(
                    f"the decoder of {self._device} refuses every image, the CPU's does not "
                    f"({_first_line(refusal)}): see that torchcodec and driver fit, or pass "
                    f"{self._kind} fast"
                )
        return decoded

    def _decode_in_parts(self, images: Sequence[Jpeg]) -> list[tuple[Tensor | BadImageError, str]]:
        # Writable, for torch would warn of the bytes' own memory.
        encoded = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
        try:
            decoded = self._decode_batch(encoded) if encoded else []
        except RuntimeError as error:
            # After an error of CUDA nothing works on the device, and less would not fit better.
            if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                raise
            self._refusal = error
            if len(images) == 1:
                return [(_decode_on_cpu(images[0]), REFUSED)]
            half = len(images) // 2
            return self._decode_in_parts(images[:half]) + self._decode_in_parts(images[half:])
        return [self._checked(image, pixels) for image, pixels in zip(images, decoded, strict=True)]

    def _checked(self, image: Jpeg, pixels: Tensor) -> tuple[Tensor | BadImageError, str]:
        if pixels.shape == (3, image.height, image.width):
            self._works = True
            return pixels, ""
        self._refusal = ValueError(f"pixels of shape {tuple(pixels.shape)}")
        return _decode_on_cpu(image), REFUSED


def device_decoder(device: torch.device) -> DeviceDecoder:
    """Raises DeviceDecodeError for a torchcodec that is unsafe on a GPU, ImportError for none."""
    if device.type == "cpu":
        return DeviceDecoder(device, None)
    decode_jpeg = import_decode_jpeg()
    import torchcodec

    check_torchcodec(torchcodec.__version__)
    return DeviceDecoder(device, lambda encoded: decode_jpeg(encoded, mode="RGB", device=device))


def check_torchcodec(version: str) -> None:
    """Raise DeviceDecodeError for a version whose GPU decoder overwrites memory in use."""
    parts = tuple(int(part) for part in version.partition("+")[0].split(".")[:2])
    if parts < _SAFE_TORCHCODEC:
        raise DeviceDecodeError(
            f"torchcodec is {version}, whose GPU decoder may write over memory that is in use: pip "
            f"install 'torchcodec>=0.17', or pass {flag('views.kind')} fast"
        )


def _photograph() -> Jpeg:
    return plain_jpeg((Path(beit_fast.data.__file__).parent / "photographs" / _PROBE).read_bytes())


def _decode_on_cpu(image: Jpeg) -> Tensor | BadImageError:
    try:
        pixels = decode_fast(image.data, image.height * image.width)
    except BadImageError as error:
        return error
    if pixels.shape[:2] != (image.height, image.width):
        return BadImageError(
            f"its header says {image.width}x{image.height} pixels, it has "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
