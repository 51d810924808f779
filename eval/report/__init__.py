"""What a run found, as pages for people: HTML, Markdown and CSV."""
