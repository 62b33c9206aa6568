"""Classes of pixels as colours: over the image with a legend, and image, truth, prediction.

Pixels stay pixels, so that borders can be judged: small images are enlarged by whole numbers.
Class ids are integers (height, width); IGNORE is hatched. Only classes that occur are explained.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beit_fast.files import naming, new_file
from beit_fast.labels import IGNORE

Colours = np.ndarray  # uint8 (C, 3)
LEVELS = 24  # of red, green and blue, among which colours are looked for
MIN_SIDE = 320  # pixels of the longer side of an image that is shown
MIN_TILE, MAX_TILE = 180, 360  # and of one among others
MAX_TEXT = 32  # letters of a class's name
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 25), (110, 110, 110)
HATCH = ((70, 70, 70), (170, 170, 170))


def palette(num_classes: int) -> Colours:
    """Colours that are far from one another, and from black, white and grey.

    Each next one is the farthest, in CIELAB, from all before: the colours of fewer classes are the
    first of those of more.
    """
    rgb, lab = _candidates()
    nearest = np.full(len(lab), np.inf, np.float32)

    def taken(point: np.ndarray) -> None:
        np.minimum(nearest, np.square(lab - point).sum(1), out=nearest)

    for grey in (0, 96, 160, 255):
        taken(_lab(np.full((1, 3), grey))[0])
    chosen = []
    for _ in range(min(num_classes, len(rgb))):
        chosen.append(int(nearest.argmax()))
        taken(lab[chosen[-1]])
    return rgb[np.resize(chosen, num_classes)]  # beyond the candidates they begin again


def colour(ids: np.ndarray, colours: Colours) -> np.ndarray:
    """uint8 (height, width, 3): each class's colour, hatching where IGNORE is."""
    height, width = ids.shape
    period = max(4, round(max(height, width) / 60))
    diagonal = (np.arange(height)[:, None] + np.arange(width)) % period < period // 2
    hatch = np.where(diagonal[..., None], *(np.array(shade, np.uint8) for shade in HATCH))
    return np.where((ids == IGNORE)[..., None], hatch, colours[np.maximum(ids, 0)])


def overlay(
    image: np.ndarray, ids: np.ndarray, colours: Colours, opacity: float = 0.6
) -> np.ndarray:
    """The classes' colours over the image's brightness, uint8 (height, width, 3).

    The image's own colours would mix with them into others.
    """
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    mixed = opacity * colour(ids, colours) + (1 - opacity) * grey[..., None]
    return mixed.round().astype(np.uint8)


def draw_overlay(
    image: np.ndarray,
    ids: np.ndarray,
    *,
    classes: Sequence[str],
    colours: Colours,
    path: Path,
) -> Path:
    """Write a PNG of `overlay` with a legend at its side: classes by their share of the pixels."""
    factor = _enlargement(*ids.shape)
    picture = _enlarged(overlay(image, ids, colours), factor)
    text = _text_size(*picture.size)
    legend = _legend([ids], classes, colours, text, picture.size)
    return _save(_beside([picture, legend], gap=text), path)


def draw_comparison(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    *,
    classes: Sequence[str],
    colours: Colours,
    path: Path,
) -> Path:
    """Write a PNG of rows of image, truth and prediction, and a legend of all that occurs."""
    columns = {
        "image": images,
        "truth": [colour(ids, colours) for ids in truths],
        "prediction": [colour(ids, colours) for ids in predictions],
    }
    tiles = {title: list(map(_tile, column)) for title, column in columns.items()}
    width = max(tile.width for tile in tiles["image"])
    text = max(12, width // 18)
    gap = max(4, text // 2)
    heights = [tile.height for tile in tiles["image"]]
    top = text + 2 * gap
    size = (3 * width + 2 * gap, top + sum(heights) + gap * (len(heights) - 1))
    board = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(board)
    for column, (title, pictures) in enumerate(tiles.items()):
        left, y = column * (width + gap), top
        pen.text((left + width / 2, top / 2), title, INK, _font(text), anchor="mm")
        for picture, height in zip(pictures, heights, strict=True):
            board.paste(picture, (left, y))
            y += height + gap
    legend = _legend([*truths, *predictions], classes, colours, text, board.size)
    return _save(_beside([board, legend], gap=2 * gap), path)


def _legend(
    maps: Sequence[np.ndarray],
    classes: Sequence[str],
    colours: Colours,
    text: int,
    beside: tuple[int, int],
) -> Image.Image:
    """A line for each class that occurs, the most frequent first.

    In columns as high as the picture of (width, height) `beside` it, and in higher ones where these
    would take more than twice its width.
    """
    ids, counts = np.unique(np.concatenate([m.ravel() for m in maps]), return_counts=True)
    order = np.lexsort((ids, -counts))
    shares = counts[order] / counts.sum()
    rows = list(zip(ids[order].tolist(), shares.tolist(), strict=True))
    rows.sort(key=lambda row: row[0] == IGNORE)  # last
    font, line, margin = _font(text), round(1.6 * text), text // 3
    names = [_shortened("ignored" if i == IGNORE else classes[i]) for i, _ in rows]
    shown = [_percent(share) for _, share in rows]
    name_width = math.ceil(max(font.getlength(name) for name in names))
    share_width = math.ceil(max(font.getlength(share) for share in shown))
    column_width = round(3.2 * text) + name_width + share_width
    fitting = max(1, (beside[1] - margin) // line)
    num_columns = min(math.ceil(len(rows) / fitting), max(1, 2 * beside[0] // column_width))
    per_column = math.ceil(len(rows) / num_columns)
    size = (num_columns * column_width, margin + per_column * line)
    board = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(board)
    for number, ((i, _), name, share) in enumerate(zip(rows, names, shown, strict=True)):
        column, row = divmod(number, per_column)
        left, middle = column * column_width, margin + (row + 0.5) * line
        box = (left, round(middle - text / 2), left + text, round(middle + text / 2))
        swatch = colour(np.full((text + 1, text + 1), i), colours)
        board.paste(Image.fromarray(swatch), box[:2])
        pen.rectangle(box, outline=INK)
        pen.text((left + 1.5 * text, middle), name, INK, font, anchor="lm")
        right = left + column_width - 1.2 * text
        pen.text((right, middle), share, FAINT, font, anchor="rm")
    return board


def _percent(share: float) -> str:
    return "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _shortened(name: str) -> str:
    """In the middle: names are often told apart by their ends."""
    name = " ".join(name.split())
    tail = MAX_TEXT // 3
    return name if len(name) <= MAX_TEXT else f"{name[: MAX_TEXT - tail - 1]}…{name[-tail:]}"


def _enlargement(height: int, width: int) -> int:
    return max(1, math.ceil(MIN_SIDE / max(height, width)))


def _text_size(width: int, height: int) -> int:
    return max(12, round(min(width, height) / 28))


def _tile(pixels: np.ndarray) -> Image.Image:
    """Enlarged by a whole number, or thinned out: colours of classes do not mix."""
    longest = max(pixels.shape[:2])
    step = math.ceil(longest / MAX_TILE)
    return _enlarged(pixels[::step, ::step], max(1, math.ceil(MIN_TILE / longest)))


def _enlarged(pixels: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1))


def _beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a row, at the top, on paper."""
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    board = Image.new("RGB", (width, max(part.height for part in parts)), PAPER)
    left = 0
    for part in parts:
        board.paste(part, (left, 0))
        left += part.width + gap
    return board


def _save(board: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), new_file(path) as file:
        board.save(file, "PNG")
    return path


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own, which is there with it: the same pictures on every machine."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


@functools.lru_cache(maxsize=1)
def _candidates() -> tuple[Colours, np.ndarray]:
    """Colours, uint8 (LEVELS³, 3), and where they lie in CIELAB, fp32."""
    levels = np.linspace(40, 240, LEVELS).round()  # the purest colours outshine the image
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    return rgb.astype(np.uint8), _lab(rgb)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB in 0..255, white D65: fp32 (n, 3). Source: CIE 15, IEC 61966-2-1."""
    linear = rgb / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ]
    xyz = linear @ np.array(to_xyz).T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)
