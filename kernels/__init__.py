"""Fused operators, each with its pure-PyTorch reference (imported as `beit_fast.kernels`).

attention/          softmax(q k^T scale + bias) v with a trainable bias shared over the batch;
                    position table (R, H) -> bias (H, N, N)
residual/           x + keep * gamma * branch, and the LayerNorm that follows, in one pass;
                    which samples skip a branch; LayerScale and affine as part of the weights
head/               what reads listed rows only: the MIM head's loss without its logits, arg-max
                    without its outputs, LayerNorm of rows, rows as they are
input/              uint8 images of any sizes -> jittered, cropped and resized views;
                    uint8 views -> normalised patches -> the sequence of the first block
conv/               convolution with ReLU, residual and pooling fused; the first, from uint8 pixels

What is called from outside also has a name of its own here:

scale_residual      rel_pos_bias        linear_cross_entropy        linear_argmax
gather_rows         mask_embed          patches             ragged_views

Below them all:

linear              x weight^T + bias, by the faster matrix library
exact_fp32          fp32 of CUDA's libraries without TF32, around what promises fp32
first_order         operators that refuse a second derivative instead of losing it
arguments           what operators ask of their arguments, and of the back end
registration        what operators of torch.library share
rows                rows in the registers of a program
_triton             what launchers share: is Triton there, one door for every launch
philox              random numbers that are a function of where they are used
"""
