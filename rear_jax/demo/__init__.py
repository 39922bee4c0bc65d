"""The page of `--job=demo`: the networks behind it, a file for each tab, and the page that serves them."""
