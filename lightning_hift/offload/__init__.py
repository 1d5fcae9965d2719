"""Where bytes live: optimizer state on the host or on disk, and its way to the device and back."""
