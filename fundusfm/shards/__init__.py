"""Files to tar shards: cohort table, dataset card, writer, index, check, statistics, adoption."""
