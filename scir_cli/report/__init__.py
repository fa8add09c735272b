"""Terminal tables, HTML pages, pictures and progress."""
