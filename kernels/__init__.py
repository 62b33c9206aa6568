"""Fused operators, each with its pure-PyTorch reference (imported as `beit_fast.kernels`).

patches                 uint8 images -> normalised patches, all or those listed
mask_embed              patches, mask token, [CLS] and positions into one sequence
attention               softmax(q k^T scale + bias) v with a trainable bias shared over the batch
rel_pos_bias            position table (R, H) -> bias (H, N, N)
scale_residual          x + keep * gamma * branch, and the LayerNorm that follows, in one pass
drop_path               which samples skip a branch: by factor, or left out of the computation
fold                    LayerScale and the norm's affine as part of the neighbouring weights
linear_cross_entropy    the MIM head's loss over masked rows only, without its logits
gather_norm             LayerNorm of listed rows; its backward scatters
gather_rows             listed rows as they are, so that what follows computes no others
linear_argmax           arg-max over a linear layer's outputs, without the outputs
conv                    convolution with ReLU, residual and pooling fused, channels last
conv_pixels             the first convolution, from uint8 pixels
linear                  x weight^T + bias, by the faster matrix library
exact_fp32              fp32 of CUDA's libraries without TF32, around what promises fp32
first_order             operators that refuse a second derivative instead of losing it
philox                  random numbers that are a function of where they are used
"""
