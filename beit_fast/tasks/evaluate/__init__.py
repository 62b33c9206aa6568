"""What a classifier is worth on labelled images, and what it says of single ones."""
