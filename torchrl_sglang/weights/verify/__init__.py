"""Proof that servers hold what was sent."""
