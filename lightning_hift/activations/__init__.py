"""What forward passes keep for backward passes, and how to keep less."""
