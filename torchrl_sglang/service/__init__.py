"""The object that a user holds."""
