"""Speed, measured side by side with other engines on the same weights."""
