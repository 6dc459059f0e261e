"""Source-term estimation: find where a plume comes from, with a sensor that is noisy and misses."""
