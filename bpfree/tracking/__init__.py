"""Observers that write down and show what a run does: MLflow, system metrics, journal, progress, plots."""
