"""What reads listed rows only: the loss over hidden patches, arg-max over a vocabulary, gathers."""
