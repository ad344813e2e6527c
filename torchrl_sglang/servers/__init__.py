"""Who serves, what they run, and everything that is asked of them."""
