"""Flows of maps that are iterated and of recurrences over time."""
