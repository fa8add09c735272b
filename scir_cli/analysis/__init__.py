"""Log-odds -> figures; numpy and pyarrow only."""
