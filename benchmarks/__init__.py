"""Benchmarks: one script per question; each prints one table, and one object with --json."""
