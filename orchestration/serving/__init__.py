"""Trained models talked to: in a terminal, and behind an address."""
