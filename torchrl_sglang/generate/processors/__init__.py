"""Logit processors: made here, run in the servers."""
