"""Two-stage sharded training on one machine or many: ranks, bytes and steps, nothing of images."""
