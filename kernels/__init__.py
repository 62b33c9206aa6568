"""Fused operators, each with its pure-PyTorch reference (imported as `beit_fast.kernels`).

attention               softmax(q k^T scale + bias) v with a trainable bias shared over the batch
linear                  x weight^T + bias, by the faster matrix library
scale_residual          x + keep * gamma * branch
linear_cross_entropy    the MIM head's loss over masked rows only
rel_pos_bias            table (R, H) -> bias (H, N, N)
"""
