"""From pixels to the sequence that enters the first block.

ragged_views.py makes views of images of any sizes, by the weights of resampling.py;
patches.py makes normalised patches of uint8 images; mask_embed.py, on mask_embed_kernels.py, makes
of embedded patches, mask token, [CLS] and positions what the first block reads.
"""
