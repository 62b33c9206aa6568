"""Photometric distortion as mmsegmentation trains with it, level for level.

Brightness, contrast, saturation and hue, each with probability 1/2; contrast comes second or last.
The two of colour go to hue, saturation and value and back, in OpenCV's arithmetic for 8 bits. Each
step ends in whole levels, cut off and not rounded.

torchvision's operations are not these: its brightness multiplies where this adds, its hue turns in
floats, its `RandomPhotometricDistort` turns by up to 18 degrees where 18 here are OpenCV's half
degrees, and it permutes channels.

Both conversions are looked up in tables of all colours, 64 and 47 MB a process, made at the first
use in half a second: two thirds of the time of the arithmetic, which is NumPy's at its best, and
the levels are OpenCV's without a way to fuse product and sum.

Source: mmsegmentation `PhotoMetricDistortion`; OpenCV `color_hsv.simd.hpp`, in its vectorised form,
which cuts off where the form for the last few pixels of a row rounds
"""

import functools
import random
from typing import NamedTuple

import numpy as np

BRIGHTNESS = 32.0  # levels, added: -this to this
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18  # -this to this - 1, of 180: as NumPy's `randint` leaves out its upper end
_HUES = 180  # OpenCV's half degrees, which fit a byte


class Distortion(NamedTuple):
    """What one image gets; None is a step left out."""

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False  # before saturation and hue; else after them
    saturation: float | None = None
    hue: int | None = None


def draw_distortion(rng: random.Random) -> Distortion:
    """The steps of one image, each in or out by a coin."""

    def coin() -> bool:
        return rng.random() < 0.5

    return Distortion(
        brightness=rng.uniform(-BRIGHTNESS, BRIGHTNESS) if coin() else None,
        contrast_first=coin(),
        contrast=rng.uniform(*CONTRAST) if coin() else None,
        saturation=rng.uniform(*SATURATION) if coin() else None,
        hue=rng.randrange(-HUE, HUE) if coin() else None,
    )


def distort(image: np.ndarray, drawn: Distortion) -> np.ndarray:
    """uint8 (height, width, 3) from the same, which stays as it is."""
    before = after = _LEVELS
    if drawn.brightness is not None:
        before = _converted(before, beta=drawn.brightness)
    if drawn.contrast is not None and drawn.contrast_first:
        before = _converted(before, alpha=drawn.contrast)
    elif drawn.contrast is not None:
        after = _converted(after, alpha=drawn.contrast)
    image = _looked_up(image, before)
    changes = []
    if drawn.saturation is not None:
        changes.append(_hue_saturation(_converted(_LEVELS, alpha=drawn.saturation), 0))
    if drawn.hue is not None:
        changes.append(_hue_saturation(_LEVELS, drawn.hue))
    if changes:
        image = _recoloured(image, changes)
    return _looked_up(image, after)


def _recoloured(image: np.ndarray, changes: list[np.ndarray]) -> np.ndarray:
    """The image after steps that are tables of `_hue_saturation`."""
    packed = np.zeros((*image.shape[:2], 4), np.uint8)
    for channel in range(3):  # NumPy copies threes of bytes slowly
        packed[..., channel] = image[..., channel]
    colours = packed.view("<i4").reshape(-1)
    for change in changes:
        hsv = hsv_of_rgb().take(colours)
        hsv = change.take(hsv >> 8) | (hsv & 255)
        colours = rgb_of_hsv().take(hsv)
    packed = colours.view(np.uint8).reshape(packed.shape)
    out = np.empty(image.shape, np.uint8)
    for channel in range(3):
        out[..., channel] = packed[..., channel]
    return out


def _hue_saturation(saturations: np.ndarray, turn: int) -> np.ndarray:
    """What becomes of hue and saturation, int32 (180 * 256,): from h 2^8 + s to h 2^16 + s 2^8."""
    hues = (np.arange(_HUES, dtype=np.int32) + turn) % _HUES
    return ((hues[:, None] << 16) + (saturations.astype(np.int32) << 8)).reshape(-1)


_LEVELS = np.arange(256, dtype=np.uint8)


def _converted(levels: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """alpha x + beta of levels, cut off to levels."""
    changed = levels.astype(np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _looked_up(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """levels[image], by the one function that looks up bytes as bytes: four times as fast."""
    if levels is _LEVELS:
        return image
    found = image.tobytes().translate(levels.tobytes())
    return np.frombuffer(found, np.uint8).reshape(image.shape)


@functools.cache
def hsv_of_rgb() -> np.ndarray:
    """int32 (2^24,), h 2^16 + s 2^8 + v of the colour r + g 2^8 + b 2^16.

    In OpenCV's fixed point: 12 bits after the point, and tables of the quotients.
    """
    levels = np.arange(256, dtype=np.int32)
    divisors = np.maximum(levels, 1)
    saturation = np.rint((255 << 12) / divisors).astype(np.int32)
    hue = np.rint((_HUES << 12) / (6 * divisors)).astype(np.int32)
    out = np.empty((256, 256, 256), np.int32)
    red, green = levels[None, :], levels[:, None]
    for blue in range(256):
        value = np.maximum(np.maximum(red, green), blue)
        spread = value - np.minimum(np.minimum(red, green), blue)
        s = (spread * saturation[value] + 2048) >> 12
        h = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
        h = np.where(value == red, green - blue, h)
        h = (h * hue[spread] + 2048) >> 12
        h += _HUES * (h < 0)
        out[blue] = (h << 16) | (s << 8) | value
    return out.reshape(-1)


@functools.cache
def rgb_of_hsv() -> np.ndarray:
    """int32 (180 * 2^16,), r + g 2^8 + b 2^16 of the colour h 2^16 + s 2^8 + v.

    In OpenCV's floats of 32 bits, where 1 - s f is rounded once: its product and sum are one
    instruction. Here the product is exact in 64 bits.
    """
    levels = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    s, v = levels[:, None], levels[None, :]
    one, full = np.float32(1), np.float32(255)
    out = np.zeros((_HUES, 256, 256, 4), np.uint8)
    for hue in range(_HUES):
        turned = np.float32(hue) * np.float32(6 / _HUES)
        sector = int(turned)
        f = turned - np.float32(sector)
        falling = (1 - s.astype(np.float64) * f).astype(np.float32)
        rising = (1 - s.astype(np.float64) * (one - f)).astype(np.float32)
        least, most = v * (one - s), np.broadcast_to(v, (256, 256))
        colour = (
            (most, v * rising, least),
            (v * falling, most, least),
            (least, most, v * rising),
            (least, v * falling, most),
            (v * rising, least, most),
            (most, least, v * falling),
        )[sector]
        for channel, share in enumerate(colour):
            out[hue, :, :, channel] = share * full  # cut off
    return out.view("<i4").reshape(-1)
