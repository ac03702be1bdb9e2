"""From raw records to batches: read, check, split, encode, store, collate."""
