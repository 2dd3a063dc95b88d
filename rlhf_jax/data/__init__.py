"""From files and built-in tasks to batches of tokens."""
