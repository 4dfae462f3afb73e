"""Evaluation: episodes of an agent, prediction of held-out video, probes, picture metrics, statistics over seeds."""
