"""What was forgotten, and at what price, as pictures."""
