"""Perception measured against exact motion."""
