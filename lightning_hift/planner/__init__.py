"""What a run will need, before it is started: bytes by group, transfer times, and what would fit."""
