"""Errors through weights that are not the forward ones: feedback alignment and its kin, bursts, and projections of targets."""
