"""What a config's programs would take on chips that are not here: compiled from shapes alone, nothing is run."""
