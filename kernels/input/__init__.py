"""From pixels to the sequence that enters the first block.

ragged_views.py makes views of images of any sizes: ragged_views_reference.py says which,
ragged_views_torch.py makes them on any device, ragged_views_triton.py by jitter_kernels.py and
resize_kernels.py, and resampling.py has the weights of a resize;
patches.py makes normalised patches of uint8 images; mask_embed.py, on mask_embed_kernels.py, makes
of embedded patches, mask token, [CLS] and positions what the first block reads.
"""
