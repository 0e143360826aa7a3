"""Certificates: what a rule really does, measured."""
