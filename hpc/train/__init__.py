"""Training: the loop, and the DeepSpeed engine, optimizers, checkpoints, health checks, signals, memory and speed it uses."""
