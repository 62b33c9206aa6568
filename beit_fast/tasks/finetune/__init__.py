"""A classifier, from a pre-trained encoder."""
