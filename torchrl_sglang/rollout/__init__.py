"""What happens to prompts and completions on either side of the servers."""
