"""The command line, and the executors that run stages: in this process, as local ranks, or as Slurm jobs."""
