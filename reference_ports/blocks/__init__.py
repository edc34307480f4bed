"""Nodes that two families truly share."""
