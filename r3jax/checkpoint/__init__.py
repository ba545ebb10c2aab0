"""Models and training states on disks and in buckets."""
