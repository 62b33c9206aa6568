"""Labels of pixels."""

IGNORE = -1  # of a pixel that no loss and no measure counts
