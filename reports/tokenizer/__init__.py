"""The page on a tokenizer, and the numbers on it."""
