"""Brightness, contrast and saturation of pixels that were cropped before they are jittered.

    brightness  x <- f x
    contrast    x <- f x + (1 - f) m          m: grey mean of the whole image as it is by then
    saturation  x <- f x + (1 - f) grey(x)    grey = 0.299 r + 0.587 g + 0.114 b

each clipped to [0, 255]. BEiT jitters the whole image and crops it then. Here the order is turned
round, which leaves a third of the pixels to touch: brightness and saturation are per pixel, and
contrast needs one number of the whole image, estimated from a grid of about 2,000 of its pixels.
What differs from the official order is then that the resize interpolates before clipping.

NumPy, not torch: torch starts a pool of threads for each loader thread that calls it on arrays of
this size.

Source: Pillow `ImageEnhance`, torchvision `ColorJitter`.
"""

import numpy as np

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow's "L"
# Pillow truncates after each of the three steps, half a level on average. The last truncation is
# our own cast to uint8; the two before it are made up for in the contrast step.
_TRUNCATION = np.float32(1.0)
_MEAN_PIXELS = 2048
# Floats worked on at a time. Arrays of a whole view would be mapped and unmapped by every call,
# and faulting their pages in took as long as the arithmetic.
_BLOCK = 32 * 1024


def jitter(
    views: tuple[np.ndarray, ...], steps: tuple[tuple[str, float], ...], image: np.ndarray
) -> None:
    """Applies `steps` ((name, factor), in this order) to the views in place, as if to `image`.

    Shapes: views uint8 (height, width, 3) each; image uint8 (height, width, 3).
    """
    if not steps:
        return
    mean = _contrast_mean(image, steps)
    for view in views:
        num_rows = max(1, _BLOCK // (3 * view.shape[1]))
        for first in range(0, len(view), num_rows):
            rows = view[first : first + num_rows]
            rows[...] = _apply(rows.astype(np.float32), steps, mean)


def _contrast_mean(image: np.ndarray, steps: tuple[tuple[str, float], ...]) -> float:
    """The grey mean of the whole image after the steps before contrast."""
    # Odd, so that the grid does not always hit the same place of the 8 x 8 blocks of a JPEG.
    stride = int((image.shape[0] * image.shape[1] / _MEAN_PIXELS) ** 0.5) | 1
    pixels = image[::stride, ::stride].reshape(1, -1, 3).astype(np.float32)
    names = [name for name, _ in steps]
    before = steps[: names.index("contrast")]
    return int((_apply(pixels, before, 0.0) @ _GREY).mean() + 0.5)


def _apply(
    pixels: np.ndarray, steps: tuple[tuple[str, float], ...], contrast_mean: float
) -> np.ndarray:
    """float32 (height, width, 3) in 0..255, changed in place where that is possible."""
    for name, factor in steps:
        factor = np.float32(factor)
        if name == "brightness":
            pixels *= factor
        elif name == "contrast":
            pixels *= factor
            pixels += (1 - factor) * np.float32(contrast_mean) - _TRUNCATION
        else:
            # Row by row of the image: products this small never wake the threads of BLAS.
            pixels = pixels @ (factor * np.eye(3, dtype=np.float32) + (1 - factor) * _GREY[:, None])
        np.clip(pixels, 0, 255, out=pixels)
    return pixels
