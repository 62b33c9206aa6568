"""What a label of a pixel says where there is none, for data and model alike."""

IGNORE = -1  # this pixel counts neither in a loss nor in a score
