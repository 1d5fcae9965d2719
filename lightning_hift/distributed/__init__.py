"""The strategies of several processes, and what only they need."""
