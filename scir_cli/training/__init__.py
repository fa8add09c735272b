"""Log-odds -> losses -> gradients -> a model folder."""
