"""Where images come from: folders, class folders, folders with masks, digits; their decoding."""
