"""Turns folders of images with their metadata into shards: download, catalog, near-duplicates, splits, packing."""
