"""Adapters, pushed alone."""
