"""Agents in environments: an environment with its perception, policies, episodes."""
