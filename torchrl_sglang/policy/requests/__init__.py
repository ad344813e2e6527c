"""From prompts to requests."""
