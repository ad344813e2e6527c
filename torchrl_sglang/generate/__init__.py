"""From requests to completions."""
