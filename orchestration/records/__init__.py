"""What a run leaves behind: its journal, its files, and their way to MLflow and Prometheus."""
