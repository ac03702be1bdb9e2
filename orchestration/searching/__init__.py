"""Which trials are tried, which go on, and what all of them together say."""
