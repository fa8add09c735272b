"""What lies on disk: schemas, dataset folders, hashes, and the files that users bring."""
