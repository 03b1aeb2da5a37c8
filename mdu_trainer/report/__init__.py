"""Model cards, pages and plots, from records alone."""
