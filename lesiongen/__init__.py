"""Training generators of skin-lesion images: data, models, stages, metrics."""
