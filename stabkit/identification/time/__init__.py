"""Readings over time: of iterated maps and of recurrences inside a step."""
