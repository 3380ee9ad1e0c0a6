"""The training loop and what it stands on: DeepSpeed engine, optimizers, checkpoints, health, preemption, memory, speed."""
