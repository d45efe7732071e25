"""What is served and how it changes: loading, versions, watching, swapping."""
