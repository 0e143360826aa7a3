"""Following a run: MLflow, which reads its log; system metrics, progress, plots, pictures."""
