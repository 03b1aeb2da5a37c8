"""Roles of the tokens of an answer, stored knowledge above all, and what became of them."""
