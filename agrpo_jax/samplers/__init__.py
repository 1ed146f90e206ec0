"""x_K -> ... -> x_0: how completions are drawn; knows no network."""
