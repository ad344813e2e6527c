"""The trainer's weights on their way into every server."""
