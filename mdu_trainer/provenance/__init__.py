"""What lies beside the weights and is never sent: facts of the unlearning, and hashes that recognise a leak."""
