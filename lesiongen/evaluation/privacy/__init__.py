"""Whether samples and priors reveal training images: copies, membership inference, and extraction."""
