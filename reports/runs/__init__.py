"""The page on training runs."""
