"""Models that draw: their pictures judged, kept, and exported to public metric scripts."""
