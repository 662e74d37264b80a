"""Images and clips: reading, augmenting, loading. Never imports models or objectives."""
