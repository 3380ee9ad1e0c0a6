"""Distributed training in stages, on one machine or many: ranks, bytes and steps. Nothing here knows about images."""
