"""Which tokens of an answer are stored knowledge, and what became of them."""
