"""The files of a run: stage directories, the metrics log and its copy in MLflow, journals. Also progress bars."""
