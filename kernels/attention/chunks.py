"""How the backward kernels that walk over images share them out.

Where a program keeps the gradient of the bias in registers, it owns a head (and a tile of
queries) and walks over one of C chunks of the images: the partial sums are C times dbias.
"""

from beit_fast.kernels._triton import cdiv

PARTIALS_BYTES = 14 << 20  # chunks are added as long as their partial sums stay below this


def num_chunks(programs: int, images: int, chunk_bytes: int, slots: int) -> int:
    """The C that ends soonest where each of C x `programs` takes one of `slots` at a time.

    images: how many there are to share out; chunk_bytes: of the partial sums of one chunk.
    """
    most = min(images, max(1, PARTIALS_BYTES // chunk_bytes), cdiv(4 * slots, programs))
    # Rounds of programs times images of each; the fewest chunks where several are as good.
    return min(range(1, most + 1), key=lambda c: (cdiv(c * programs, slots) * cdiv(images, c), c))
