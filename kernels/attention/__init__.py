"""softmax(q k^T scale + bias) v with a trainable bias shared over the batch.

What is called from outside stands here. reference.py is its specification, functional.py checks the
arguments, backends.py chooses what runs and has what belongs to other libraries, operators.py the
operators of torch, cpu.py what they run on processors.

The kernels with their launchers: forward.py on forward_tiles.py; backward.py chooses among
backward_window.py, backward_hopper.py with backward_hopper_dk_dv.py, and backward_general.py with
backward_dbias.py on backward_tiles.py. bias.py and rel_pos_bias.py are what they read and give of a
bias; configs.py, chunks.py, strides.py and descriptors.py belong to their launches.
"""

from beit_fast.kernels.attention.backends import use_backend
from beit_fast.kernels.attention.functional import (
    attention,
    attention_backend,
    attention_qkvpacked,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)
from beit_fast.kernels.attention.reference import attention_lse_reference, attention_reference

__all__ = [
    "attention",
    "attention_backend",
    "attention_lse_reference",
    "attention_qkvpacked",
    "attention_reference",
    "rel_pos_attention",
    "rel_pos_attention_qkvpacked",
    "use_backend",
]
