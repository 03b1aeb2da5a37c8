"""Decoding and likelihood of masked diffusion language models."""
