"""Floor 3: from the features of a tower to rows of the media table, found by module name."""
