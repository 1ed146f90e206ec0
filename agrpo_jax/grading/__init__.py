"""Worker processes in which completions are graded."""
