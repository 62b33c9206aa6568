"""Where images come from: folders, class folders, digits, parts of these; and their decoding."""
