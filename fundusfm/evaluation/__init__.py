"""Measuring a checkpoint: features once, then probes, neighbours, zero-shot reading, retrieval, a report."""
