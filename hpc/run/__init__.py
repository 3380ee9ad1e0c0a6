"""What a run leaves on disk: stage directories, the metrics log and its copy in MLflow, journals, progress bars."""
