"""Baselines: one file for each device that was measured."""
