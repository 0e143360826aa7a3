"""Double precision where a test compares with a reference."""
