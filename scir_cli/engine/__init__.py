"""Tokens in, log-probabilities out."""
