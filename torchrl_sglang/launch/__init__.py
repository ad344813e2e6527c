"""The life of the child processes: servers and router. Imports no torch."""
