"""The trainers: fine-tuning and unlearning, checkpoints that are whole, and who answers for theta_0."""
