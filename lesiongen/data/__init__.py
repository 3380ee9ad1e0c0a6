"""From packed shards to batches: images, augmentation, facts, sample order. See docs/data.md."""
