"""How one training begins, goes on and survives."""
