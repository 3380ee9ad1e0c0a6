"""Metrics and pictures of tokenizers, priors and samples, and the report that shows them."""
