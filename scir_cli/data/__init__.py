"""Data on disk: schemas, dataset folders, hashes, and readers of input files."""
