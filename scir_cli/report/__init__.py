"""What a person sees: terminal tables, HTML pages, plots, progress."""
