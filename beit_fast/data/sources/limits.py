"""How large an image may be."""

MAX_PIXELS = 64_000_000  # in one file; a larger one is refused from its header, undecoded
