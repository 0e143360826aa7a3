"""NoProp plugin."""
