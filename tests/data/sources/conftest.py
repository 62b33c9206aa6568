"""Trees of files whose names alone matter."""

import pytest


@pytest.fixture
def touch(tmp_path):
    """`touch("a/1.jpg", ...)` makes empty files below the test's folder."""

    def touch(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    return touch
