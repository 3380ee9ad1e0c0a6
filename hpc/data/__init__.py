"""From bytes on disk to samples in order: shards, their manifests and storage, the sample order, the code store."""
