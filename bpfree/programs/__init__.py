"""Programs that come with the core."""
