"""Train generators of skin-lesion images: data, tokenizers, priors, stages, evaluation."""
