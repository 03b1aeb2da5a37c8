"""Records beside the weights that are never sent: facts of the unlearning, and hashes that recognise a leak."""
