"""Trained models asked and measured."""
