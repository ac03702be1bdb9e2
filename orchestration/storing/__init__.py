"""The storage in an object store: files, what is kept there, and when."""
