"""Tests of stabkit.tracing."""
