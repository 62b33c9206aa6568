"""Images to discrete visual tokens: the DALL-E dVAE, its published weights, its training loss."""
