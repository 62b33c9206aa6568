"""Folders of images to batches: masks, two views of one crop, order, prefetch and exact resume."""
