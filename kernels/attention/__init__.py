"""softmax(q k^T scale + bias) v with a trainable bias shared over the batch.

What is called from outside stands here. operators.py defines it, backends.py chooses what runs,
forward.py and the three backward_*.py are the kernels, cpu.py their like for processors, bias.py
and rel_pos_bias.py what they read and give of a bias, configs.py and chunks.py their launches.
"""

from beit_fast.kernels.attention.backends import use_backend
from beit_fast.kernels.attention.operators import (
    attention,
    attention_backend,
    attention_lse_reference,
    attention_qkvpacked,
    attention_reference,
    rel_pos_attention,
    rel_pos_attention_qkvpacked,
)

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
