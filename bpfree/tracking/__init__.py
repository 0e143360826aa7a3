"""Follow a run: trackers such as MLflow, system metrics, progress, plots, pictures."""
