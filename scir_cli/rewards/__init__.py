"""A pair -> the token paths to score -> log-odds of each internal reward model."""
