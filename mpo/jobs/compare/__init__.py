"""``mpo compare``: objectives and settings on the same data, model and budget, measured by one suite."""
