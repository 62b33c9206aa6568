"""Images made on the fly, and the photographs of the package."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beit_fast.data


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with a little noise: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int32)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def make_image():
    return lambda height, width, seed=0: Image.fromarray(photo_like(height, width, seed))


@pytest.fixture
def make_file():
    return encode


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    folder = Path(beit_fast.data.__file__).parent / "photographs"
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


@pytest.fixture
def image_folder(tmp_path):
    """200 small JPEGs in four classes."""
    for i in range(200):
        path = tmp_path / f"class{i % 4}" / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Image.fromarray(photo_like(40, 50, i)), "JPEG"))
    return tmp_path
