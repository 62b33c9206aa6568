"""What is made of an image: crops, jitters, mixtures, for training and for tests."""
