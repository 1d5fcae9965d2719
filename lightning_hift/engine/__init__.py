"""One run of one optimizer, in plain torch: what it steps, what it sees, what is saved of it."""
