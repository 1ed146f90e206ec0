"""Whether a run fits, and what it takes, before it is started."""
