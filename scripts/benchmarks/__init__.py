"""Sections of scripts/benchmark.py."""
